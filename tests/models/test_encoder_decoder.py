"""The EncoderDecoder's promises: the source is read once, cached is uncached, padding of either side is not seen."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from llm_atlas.infer.generate import generate, stream
from llm_atlas.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig, Reading
from llm_atlas.models.families import build
from llm_atlas.models.families_encoders import bart_weights, from_bart_config, from_t5_config, t5_weights
from llm_atlas.nn.masks import PAD, left_pad

SIZES = {"vocab": 31, "dim": 16, "layers": 2, "decoder_layers": 3, "heads": 4, "hidden": 24, "context": 24}
T5 = EncoderDecoderConfig(
    **SIZES, head_dim=5, relative_buckets=8, relative_distance=10, attention_scale=1.0, scale_logits=True
)
BART = EncoderDecoderConfig(
    **SIZES, activation="gelu", bias=True, norm="layer", norm_eps=1e-5, placement="post", positions="learned",
    embed_norm=True, embed_scale=4.0, tied=False, logits_bias=True,
)  # fmt: skip
CONFIGS = {"t5": T5, "bart": BART}
SOURCES = [[5, 6, 7, 8, 9, 10], [11], [12, 13, 14]]
PROMPTS = [[1, 20], [1, 21], [1, 22]]


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        scale = (
            2 * parameter.shape[1] ** -0.5 if parameter.dim() == 2 else 0.3 if name.endswith("bias") else 1.0
        )
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return model.eval().requires_grad_(False)


def made(name: str) -> EncoderDecoder:
    return randomised(EncoderDecoder(CONFIGS[name]))


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(31, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("chunks", [[1] * 9, [4, 1, 1, 3], [9]], ids=str)
def test_cached_is_uncached(name, chunks):
    model, source, target = made(name), ids(2, 7), ids(2, 9, seed=1)
    expected = model(source, target)
    reading = model.read(source)
    cache = reading.make_cache()
    parts = [reading(part, cache=cache) for part in target.split(chunks, dim=1)]
    assert_close(torch.cat(parts, dim=1), expected, atol=2e-5, rtol=1e-5)
    assert_close(reading(target), expected, atol=2e-5, rtol=1e-5)  # the source cached, the target not
    assert (cache.length, len(cache), reading.context_cache[0].length) == (9, 3, 7)
    # 3 layers, keys and values, rows, heads, tokens, features of a head, bytes
    features = 5 if name == "t5" else 4
    assert reading.context_cache.nbytes == 3 * 2 * 2 * 4 * 7 * features * 4


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_sources_and_targets_are_those_alone(name, side):
    model = made(name)
    sources, source_positions = left_pad(SOURCES, pad_id=3)
    if side == "right":
        order = (source_positions == PAD).long().argsort(dim=1, stable=True)
        sources, source_positions = sources.gather(1, order), source_positions.gather(1, order)
    rows = [[1, 20], [1, 21, 22, 23], [1]]
    targets, positions = left_pad(rows, pad_id=2)
    batch = model(sources, targets, source_positions=source_positions, positions=positions)
    reading = model.read(sources, positions=source_positions)
    assert_close(reading(targets, positions=positions), batch, atol=2e-5, rtol=1e-5)
    for source, row, logits in zip(SOURCES, rows, batch, strict=True):
        alone = model(torch.tensor([source]), torch.tensor([row]))[0]
        assert_close(logits[-len(row) :], alone, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_decoder_sees_all_of_the_source_and_its_own_past(name):
    model, source, target = made(name), ids(1, 5), ids(1, 6, seed=1)
    before = model(source, target)
    for at in range(5):
        changed = source.clone()
        changed[0, at] = (source[0, at] + 1) % 31
        assert ((model(changed, target) - before).abs().amax(-1) > 1e-5).all()
    for at in range(6):
        changed = target.clone()
        changed[0, at] = (target[0, at] + 1) % 31
        moved = (model(source, changed) - before).abs().amax(-1)[0]
        assert (moved[:at] == 0).all()
        assert (moved[at:] > 1e-5).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_source_is_read_once_and_its_keys_are_made_once(name):
    model = made(name)
    sources, positions = left_pad(SOURCES)
    calls = {"encoder": 0, "keys": 0, "values": 0, "own keys": 0}

    def count(what):
        def hook(*_):
            calls[what] += 1

        return hook

    handles = [model.encoder.blocks[0].register_forward_hook(count("encoder"))]
    for block in model.decoder.blocks:
        handles.append(block.cross.sublayer.k.register_forward_hook(count("keys")))
        handles.append(block.cross.sublayer.v.register_forward_hook(count("values")))
        handles.append(block.mixer.sublayer.k.register_forward_hook(count("own keys")))
    generate(model.read(sources, positions=positions), PROMPTS, max_new_tokens=8)
    for handle in handles:
        handle.remove()
    assert calls == {"encoder": 1, "keys": 3, "values": 3, "own keys": 3 * 8}


@pytest.mark.parametrize("name", CONFIGS)
def test_generate_writes_the_argmax_of_everything_read_again(name):
    model = made(name)
    sources, positions = left_pad(SOURCES)
    written = generate(model.read(sources, positions=positions), PROMPTS, max_new_tokens=12)
    assert len({*map(tuple, written)}) > 1
    for source, row, new in zip(SOURCES, PROMPTS, written, strict=True):
        assert generate(model.read(torch.tensor([source])), [row], max_new_tokens=12) == [new]
        for token in new:
            assert token == model(torch.tensor([source]), torch.tensor([row]))[0, -1].argmax()
            row = [*row, token]


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_generate_is_that_of_transformers(kind):
    from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

    if kind == "t5":
        config = T5Config(
            vocab_size=31, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0
        )
        theirs, read, weights = T5ForConditionalGeneration(config), from_t5_config, t5_weights
    else:
        config = BartConfig(
            vocab_size=31, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=24,
            pad_token_id=1, decoder_start_token_id=0, forced_eos_token_id=None,
        )  # fmt: skip
        theirs, read, weights = BartForConditionalGeneration(config), from_bart_config, bart_weights
    randomised(theirs)
    ours = read(config.to_dict())
    model = build(ours, weights(theirs.state_dict(), ours), EncoderDecoder).eval()
    # BART's own positions count padding, so it stands on the right.
    longest = max(map(len, SOURCES))
    sources = torch.tensor([row + [1] * (longest - len(row)) for row in SOURCES])
    positions = torch.tensor([[*range(len(row))] + [PAD] * (longest - len(row)) for row in SOURCES])
    written = theirs.generate(
        sources, attention_mask=(positions > PAD).long(), max_new_tokens=15, min_new_tokens=15, do_sample=False,
        num_beams=1, eos_token_id=None, pad_token_id=1,
    )[:, 1:].tolist()  # fmt: skip
    assert len({*map(tuple, written)}) > 1
    assert (
        kind == "bart" or len(set(written[0])) > 2
    )  # a random post-norm decoder says one token over and over
    assert generate(model.read(sources, positions=positions), [[0]] * 3, max_new_tokens=15) == written


def test_a_reading_may_be_taken_apart_and_multiplied():
    model = made("bart")
    sources, positions = left_pad(SOURCES)
    reading, target = model.read(sources, positions=positions), ids(3, 4)
    for used in (False, True):  # the keys and values of the source are not there yet, or are
        if used:
            reading(target)
        rows = [2, 0, 0, 1]
        chosen = reading.select(rows)
        assert_close(chosen(target[rows]), model(sources, target, source_positions=positions)[rows])
        assert_close(reading(target), model(sources, target, source_positions=positions))
    with model.decoder.blocks[0].cross.sublayer.k.register_forward_hook(lambda *_: pytest.fail("made again")):
        reading.select([0, 0])(target[:2])


def test_the_written_cache_may_fork_without_the_source():
    reading, target = made("t5").read(ids(2, 7)), ids(2, 6)
    cache = reading.make_cache()
    reading(target[:, :3], cache=cache)
    twin = cache.fork()
    cache.truncate(1)
    expected = reading(target)
    assert_close(reading(target[:, 3:], cache=twin), expected[:, 3:], atol=2e-5, rtol=1e-5)
    assert_close(reading(target[:, 1:], cache=cache), expected[:, 1:], atol=2e-5, rtol=1e-5)


def test_reading_in_inference_mode_and_then_without():
    model = made("t5")
    with torch.inference_mode():
        reading = model.read(ids(2, 7))
        reading(ids(2, 3))
    assert_close(reading(ids(2, 4)), model(ids(2, 7), ids(2, 4)), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_gets_a_gradient(name):
    model = made(name).requires_grad_(True)
    model(ids(2, 5), ids(2, 6)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_it_learns_to_turn_around():
    generator = torch.Generator().manual_seed(0)
    config = EncoderDecoderConfig(
        vocab=8, dim=32, layers=1, heads=2, hidden=64, context=8, positions="learned"
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = EncoderDecoder(config)
        nn.init.normal_(model.embed.weight, std=32**-0.5)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(200):
        source = torch.randint(1, 8, (32, 4), generator=generator)
        target = torch.cat([torch.zeros(32, 1, dtype=torch.long), source.flip(1)], dim=1)
        loss = nn.functional.cross_entropy(
            model(source, target[:, :-1]).flatten(0, 1), target[:, 1:].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.5
    assert sum(losses[-5:]) / 5 < 0.1
    source = torch.randint(1, 8, (16, 4), generator=generator)
    assert generate(model.read(source), [[0]] * 16, max_new_tokens=4) == source.flip(1).tolist()


def test_the_dtype_is_kept():
    model = made("bart").bfloat16()
    logits = model(ids(2, 5), ids(2, 6))
    assert logits.dtype == torch.bfloat16
    reading = model.read(ids(2, 5))
    cache = reading.make_cache()
    reading(ids(2, 6), cache=cache)
    assert reading.context_cache[0].read()[0].dtype == cache[0].read()[0].dtype == torch.bfloat16


def test_halves_have_tables_of_their_own():
    model = made("t5")
    assert model.encoder.attention_positions.bidirectional
    assert not model.decoder.attention_positions.bidirectional
    assert sum("attention_positions.table" in name for name, _ in model.named_parameters()) == 2
    assert model.encoder.embed is None
    assert [len(model.encoder.blocks), len(model.decoder.blocks)] == [2, 3]


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab": 0}, "vocab 0 must be at least 1"),
        ({"decoder_layers": 0}, "decoder_layers 0 must be at least 1"),
        ({"positions": "alibi"}, "positions 'alibi' is not one of none, sinusoidal, learned, t5"),
        ({"head_dim": None, "heads": 3}, "dim 16 must divide into 3 heads"),
    ],
)
@pytest.mark.untyped
def test_a_bad_configuration_is_named(change, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        dataclasses.replace(T5, **change)


MODEL = made("t5")


def on_another_batch():
    reading = MODEL.read(ids(2, 5))
    cache = reading.make_cache()
    reading(ids(2, 3), cache=cache)
    MODEL.read(ids(1, 5))(ids(1, 3), cache=cache)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MODEL(ids(1, 25), ids(1, 2)), r"25 tokens do not fit the context of 24"),
        (lambda: MODEL(ids(1, 2), ids(1, 25)), r"25 tokens do not fit the context of 24"),
        (lambda: MODEL(torch.tensor([[31]]), ids(1, 2)), r"token id 31 is outside the vocabulary of 31"),
        (lambda: MODEL(ids(1, 2), torch.tensor([[-1]])), r"token id -1 is outside the vocabulary of 31"),
        (lambda: MODEL(ids(2, 3), ids(3, 4)), r"the target has 3 rows, the source 2: they must be equal"),
        (
            lambda: generate(MODEL.read(ids(2, 3)), [[1]], max_new_tokens=1),
            r"the target has 1 rows, the source 2: they must be equal",
        ),
        (
            lambda: stream(MODEL.read(ids(1, 3)), [[1]], max_new_tokens=25),
            r"a past of 0, a prompt of 1 and 25 new tokens do not fit the context of 24",
        ),
        (on_another_batch, r"the cache holds 2 rows, the new ids have 1"),
        (
            lambda: Reading(MODEL, torch.zeros(1, 3, 16))(ids(1, 2), positions=torch.tensor([[0, 1, 2]])),
            r"positions have shape \(1, 3\), the tokens have \(1, 2\): they must be equal",
        ),
    ],
)
@pytest.mark.untyped
def test_a_mistake_is_named(call, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        call()
