"""Connectors: exact whatever the shortcut, blind to padding, of the size of the LLM's own embeddings."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import tiny_llm, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from speech_llm.errors import UserError
from speech_llm.model.configuration import complete_connector
from speech_llm.model.connectors import CrossAttention, QFormerConnector, StackConnector, calibrate

BOTH = ["qformer", "stack"]


def connector(kind: str, taps: int = 3, frame_width: int = 24, llm_width: int = 32, **settings):
    torch.manual_seed(0)
    cls = {"qformer": QFormerConnector, "stack": StackConnector}[kind]
    return cls(complete_connector({"type": kind, **settings}), taps, frame_width, llm_width).eval()


@pytest.mark.parametrize("folded", [True, False])
def test_cross_attention_equals_multihead_attention(folded: bool) -> None:
    torch.manual_seed(0)
    heads, width = 4, 24
    ours = CrossAttention(width, width, heads).double()
    reference = torch.nn.MultiheadAttention(width, heads, batch_first=True).double()
    with torch.no_grad():
        for part in (ours.query, ours.value, ours.out):
            part.bias.normal_()
        reference.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]))
        # A key bias shifts all scores of a query alike, so the reference may have any.
        reference.in_proj_bias.copy_(torch.cat([ours.query.bias, torch.randn(width), ours.value.bias]))
        reference.out_proj.weight.copy_(ours.out.weight)
        reference.out_proj.bias.copy_(ours.out.bias)
    queries, frames = torch.randn(2, 3, 5, width).double(), torch.randn(2, 3, 11, width).double()
    mask = torch.arange(11)[None] < torch.tensor([11, 4])[:, None]
    got = ours(queries, frames, mask, folded=folded)
    for tap in range(3):
        wanted, _ = reference(queries[:, tap], frames[:, tap], frames[:, tap], key_padding_mask=~mask)
        torch.testing.assert_close(got[:, tap], wanted, atol=1e-10, rtol=0)


def test_folded_qformer_equals_projected_one_in_values_and_gradients() -> None:
    layer = connector("qformer", queries=2, heads=2, width=32)
    features, counts = torch.randn(3, 17, 3, 24), torch.tensor([17, 9, 1])
    results = []
    for folded in (True, False):
        layer.zero_grad()
        for block in layer.blocks:
            block.cross.forward = lambda h, f, m, _b=block.cross, _f=folded: CrossAttention.forward(
                _b, h, f, m, _f
            )
        vectors, _ = layer(features, counts)
        vectors.square().sum().backward()
        results.append((vectors.detach(), [p.grad.clone() for p in layer.parameters()]))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-5, rtol=1e-5)
    for first, second in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(first, second, atol=1e-3, rtol=1e-4)


def test_qformer_equals_plain_reference() -> None:
    """The whole connector, written out with the library's own attention, clip by clip and layer by layer."""
    layer = connector("qformer", queries=4, heads=2, layers=2)
    with torch.no_grad():
        layer.layer_weights.normal_()
    features, counts = torch.randn(2, 9, 3, 24), torch.tensor([9, 5])
    got, _ = layer(features, counts)
    for clip in range(2):
        outputs = []
        for tap in range(3):
            frames = torch.nn.functional.layer_norm(features[clip, : counts[clip], tap], (24,))
            hidden = layer.queries[tap]
            for block in layer.blocks:
                attention = torch.nn.MultiheadAttention(24, 2, batch_first=True)
                with torch.no_grad():
                    attention.in_proj_weight.copy_(block.self_qkv.weight)
                    attention.in_proj_bias.copy_(block.self_qkv.bias)
                    attention.out_proj.load_state_dict(block.self_out.state_dict())
                hidden = block.self_norm(hidden + attention(hidden[None], hidden[None], hidden[None])[0][0])
                key, value = frames @ block.cross.key.weight.T, block.cross.value(frames)
                query = block.cross.query(hidden)
                heads = []
                for h in range(2):
                    part = slice(12 * h, 12 * h + 12)
                    weights = (query[:, part] @ key[:, part].T / math.sqrt(12)).softmax(-1)
                    heads.append(weights @ value[:, part])
                hidden = block.cross_norm(hidden + block.cross.out(torch.cat(heads, -1)))
                hidden = block.ffn_norm(
                    hidden + block.ffn_out(torch.nn.functional.gelu(block.ffn_in(hidden)))
                )
            outputs.append(hidden)
        mix = layer.layer_weights.softmax(-1)
        mixed = sum(outputs[tap] * mix[:, tap, None] for tap in range(3))
        wanted = layer.scale * layer.proj(layer.norm(mixed))
        torch.testing.assert_close(got[clip], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", BOTH)
def test_a_clips_vectors_do_not_depend_on_its_batch_mates_or_padding(kind: str) -> None:
    layer = connector(kind, stack=4)
    features = torch.randn(3, 21, 3, 24)
    counts = torch.tensor([21, 10, 3])
    features[1, 10:] = float("nan")
    features[2, 3:] = 1e6
    together, sizes = layer(features, counts)
    for clip, count in enumerate(counts.tolist()):
        alone, size = layer(features[clip : clip + 1, :count], torch.tensor([count]))
        assert int(sizes[clip]) == int(size[0])
        torch.testing.assert_close(together[clip, : int(size[0])], alone[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("frames", [1, 3, 4, 5, 21])
def test_the_number_of_vectors_is_known_without_running_the_connector(kind: str, frames: int) -> None:
    layer = connector(kind, stack=4, queries=5)
    vectors, counts = layer(torch.randn(2, 21, 3, 24), torch.tensor([frames, 21]))
    assert int(counts[0]) == layer.num_vectors(frames) == (5 if kind == "qformer" else math.ceil(frames / 4))
    assert vectors.shape == (2, layer.num_vectors(21), 32)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("size", [0.02, 1.0])
def test_fresh_vectors_lie_among_the_llms_embeddings(kind: str, size: float) -> None:
    """As long as words are, and around the words' mean."""
    model, _ = tiny_model(connector={"type": kind})
    table = tiny_llm().get_input_embeddings()
    with torch.no_grad():
        table.weight.normal_(std=size)
        table.weight.add_(2 * size * torch.randn(32))
        calibrate(model.connector, table, 300)
        features = 5 * torch.randn(20, 60, len(model.config.taps), 24)
        vectors, _ = model.connector(features, torch.full((20,), 60))
        words = table.weight
        length = float(words.norm(dim=-1).median())
        assert 0.6 * length < float(vectors.norm(dim=-1).mean()) < 1.6 * length
        assert float(torch.cosine_similarity(vectors.mean((0, 1)), words.mean(0), dim=0)) > 0.8


@pytest.mark.parametrize("kind", BOTH)
def test_every_parameter_learns(kind: str) -> None:
    layer = connector(kind, stack=4)
    vectors, _ = layer(torch.randn(2, 9, 3, 24), torch.tensor([9, 6]))
    (vectors * torch.randn_like(vectors)).sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in layer.parameters())


@pytest.mark.parametrize("kind", BOTH)
def test_half_precision_features_are_read_in_the_connectors_own_precision(kind: str) -> None:
    layer = connector(kind)
    features = torch.randn(1, 16, 3, 24).half()
    vectors, _ = layer(features, torch.tensor([16]))
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors, layer(features.float(), torch.tensor([16]))[0])


def test_frames_are_not_projected_when_queries_are_few() -> None:
    """2.5 s of Whisper tiny (125 frames x 4 layers x 384) cost well under a thousandth of the LLM's work on the clip."""
    layer = connector("qformer", taps=4, frame_width=384, llm_width=576, queries=8, layers=2, heads=4)
    narrow = QFormerConnector(complete_connector({"width": 256}), 4, 384, 576)
    features, counts = torch.randn(16, 125, 4, 384), torch.full((16,), 125)
    for module, limit in ((layer, 0.23e9), (narrow, 0.15e9)):
        with FlopCounterMode(display=False) as counter:
            module(features, counts)
        assert counter.get_total_flops() / 16 < limit


def test_wrong_frame_counts_are_refused() -> None:
    layer = connector("qformer")
    for counts in ([10], [11, 3], [0, 3]):
        with pytest.raises(ValueError, match="frame counts"):
            layer(torch.randn(2, 10, 3, 24), torch.tensor(counts))


def test_a_misspelt_connector_setting_names_the_nearest() -> None:
    with pytest.raises(UserError, match="Did you mean 'queries'"):
        complete_connector({"querys": 3})
    with pytest.raises(UserError, match="qformer, stack"):
        complete_connector({"type": "mlp"})
    with pytest.raises(UserError, match=r"connector\.stack is 0"):
        complete_connector({"type": "stack", "stack": 0})
    with pytest.raises(UserError, match="multiple of"):
        connector("qformer", heads=5)
