"""FLUX's network says what diffusers' FluxTransformer2DModel says, with the same weights."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

from engine.families.flux import diffusers_state, linears_of, with_ones
from engine.layers.linear import Linear
from engine.layers.norms import RMSNorm
from engine.models.flux import Flux, FluxConfig, sinusoidal
from engine.problems import ProblemError

DEV = FluxConfig(num_layers=2, num_single_layers=2, attention_head_dim=32, num_attention_heads=3,
                 joint_attention_dim=40, pooled_projection_dim=24, in_channels=16, out_channels=16,
                 axes_dims_rope=(8, 12, 12))  # fmt: skip
SCHNELL = FluxConfig(num_layers=1, num_single_layers=3, attention_head_dim=64, num_attention_heads=2,
                     joint_attention_dim=48, pooled_projection_dim=16, in_channels=64, out_channels=64,
                     axes_dims_rope=(16, 24, 24), guidance_embeds=False)  # fmt: skip


def random_network(config: FluxConfig, seed: int = 0) -> Flux:
    """Weights as uneven as trained ones: norms off 1, biases and gates off 0."""
    generator = torch.Generator().manual_seed(seed)
    network = Flux(config).eval().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, Linear) and module.bias is not None:
            module.bias += 0.1 * torch.randn(module.bias.shape, generator=generator)
        if isinstance(module, RMSNorm):
            module.weight += 0.2 * torch.randn(module.weight.shape, generator=generator)
    return network


def oracle_of(network: Flux) -> FluxTransformer2DModel:
    config = {k: v for k, v in network.config.to_json().items() if k != "_class_name"}
    oracle = FluxTransformer2DModel(**{**config, "axes_dims_rope": tuple(config["axes_dims_rope"])})
    oracle.load_state_dict(diffusers_state(network))
    return oracle.eval().requires_grad_(False)


@pytest.mark.parametrize("config", [DEV, SCHNELL], ids=["dev", "schnell"])
@pytest.mark.parametrize(("batch", "height", "width", "tokens"), [(1, 4, 4, 5), (2, 3, 7, 1), (3, 8, 2, 17)])
def test_velocity_is_that_of_diffusers(config, batch, height, width, tokens):
    network = random_network(config)
    oracle = oracle_of(network)
    generator = torch.Generator().manual_seed(batch)
    image = torch.randn(batch, height * width, config.in_channels, generator=generator)
    text = torch.randn(batch, tokens, config.joint_attention_dim, generator=generator)
    pooled = torch.randn(batch, config.pooled_projection_dim, generator=generator)
    timestep = torch.rand(batch, generator=generator)
    guidance = torch.full((batch,), 3.5) if config.guidance_embeds else None
    ids = torch.stack(torch.meshgrid(torch.arange(1), torch.arange(height), torch.arange(width), indexing="ij"), -1)
    image_ids, text_ids = ids.reshape(-1, 3).float(), torch.zeros(tokens, 3)
    ours = network(image, text, pooled, timestep, guidance, image_ids, text_ids)
    theirs = oracle(
        hidden_states=image, encoder_hidden_states=text, pooled_projections=pooled, timestep=timestep,
        guidance=guidance, img_ids=image_ids, txt_ids=text_ids, return_dict=False,
    )[0]  # fmt: skip
    assert (ours - theirs).norm() / theirs.norm() < 1e-5


def test_sixteen_bit_state_has_every_key_of_diffusers():
    network = Flux(DEV)
    oracle = oracle_of(network)
    assert set(diffusers_state(network)) == set(oracle.state_dict())


def test_every_linear_has_a_name_in_the_key_map():
    network = Flux(DEV)
    named = {name for name, module in network.named_modules() if isinstance(module, Linear)}
    assert named == {names.name for names in linears_of(DEV)}


def test_the_one_of_a_scale_goes_in_and_out():
    names = next(names for names in linears_of(DEV) if names.splits == 6)
    bias = torch.randn(6 * DEV.hidden_size)
    with_one = with_ones(names, bias, 1.0)
    assert (with_one - bias).view(6, -1).mean(1).round().tolist() == [0, 1, 0, 0, 1, 0]
    assert torch.allclose(with_ones(names, with_one, -1.0), bias, atol=1e-6)


def test_timesteps_near_each_other_stay_apart():
    embedding = sinusoidal(torch.tensor([875.0, 876.0]))
    assert embedding.dtype == torch.float32
    assert (embedding[0] - embedding[1]).abs().max() > 0.4


def test_a_stop_between_blocks_is_obeyed():
    network = random_network(SCHNELL)
    seen = []

    def stop() -> None:
        seen.append(1)
        if len(seen) == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        network(torch.zeros(1, 4, 64), torch.zeros(1, 2, 48), torch.zeros(1, 16), torch.ones(1), None,
                torch.zeros(4, 3), torch.zeros(2, 3), before_block=stop)  # fmt: skip
    assert len(seen) == 2


@pytest.mark.parametrize(
    "config",
    [{"num_layers": 10**9}, {"num_layers": True}, {"attention_head_dim": 128, "axes_dims_rope": [1, 2]},
     {"guidance_embeds": "yes"}, {"in_channels": "64"}, {"axes_dims_rope": None}],
    ids=["absurd", "bool", "axes", "guidance", "text", "null"],
)  # fmt: skip
def test_an_absurd_config_is_refused(config):
    with pytest.raises(ProblemError) as refused:
        FluxConfig.from_json(config, "x.safetensors")
    assert next(iter(config)) in refused.value.problem.what or "axes" in refused.value.problem.what
