"""The parts networks are assembled from: linears of every width, attention, norms, rotary positions."""
