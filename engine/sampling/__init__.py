"""From noise to latents: sigmas, Euler steps, guidance, noise. Takes a function, knows no network."""
