"""The command line: `llm-atlas generate`, `llm-atlas assets`, `llm-atlas concepts`, `llm-atlas course`."""

import enum
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="llm-atlas",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Dtype(enum.StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class State(enum.StrEnum):
    planned = "planned"
    partial = "partial"
    done = "done"


def _plainly(command: Callable[..., None]) -> Callable[..., None]:
    """A mistake or a missing file is one line on stderr and status 1, Ctrl-C is status 130; no tracebacks."""

    @functools.wraps(command)
    def run(*args: object, **kwargs: object) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except BrokenPipeError:  # `| head` has seen enough; typer ends without a word
            raise
        except (ValueError, OSError, RuntimeError) as error:
            if isinstance(error, typer.Exit):  # a RuntimeError too
                raise
            typer.echo(f"llm-atlas: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(1) from None

    return run


def _version(wanted: bool) -> bool:
    if wanted:
        from llm_atlas import __version__

        typer.echo(__version__)
        raise typer.Exit
    return wanted


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """LLM Atlas: large language models, built from scratch, run and checked."""


@app.command()
@_plainly
def generate(
    prompt: Annotated[
        str, typer.Argument(help="What to say to the model, or, with --no-chat, to write on from.")
    ],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token; above, draws.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    chat: Annotated[bool, typer.Option(help="Answer the prompt, or write on from it as it stands.")] = True,
    dtype: Annotated[Dtype | None, typer.Option(help="Number format; chosen by device if not given.")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, mps; the fastest if not given.")
    ] = None,
) -> None:
    """Write text with SmolLM2-135M, as it comes; fetched on first use (93 MB)."""
    if not prompt.strip():
        raise ValueError("the prompt is empty; write something for the model to go on from")
    import torch

    from llm_atlas.core.device import pick_device
    from llm_atlas.core.seeds import generator
    from llm_atlas.infer.generate import stream
    from llm_atlas.models.pretrained import load_smollm2
    from llm_atlas.text.chat_template import encode_chat

    place = pick_device(device)
    model, tokenizer = load_smollm2(place, None if dtype is None else getattr(torch, dtype))
    if chat:
        ids = encode_chat(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)
    else:
        ids = tokenizer.encode(prompt)
    steps = stream(
        model,
        [ids],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        stop_ids=(tokenizer.special["<|im_end|>"], tokenizer.special["<|endoftext|>"]),
        generator=generator(seed, place),
    )
    text = tokenizer.stream(skip_special=True)
    for [token] in steps:
        if token is not None:
            typer.echo(text.push(token), nl=False)
    typer.echo(text.flush())


@app.command()
@_plainly
def assets(
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every file through and compare its sha256.")
    ] = False,
) -> None:
    """Fetch the real models and data the book runs on; say where they are, how large, and under which licence."""
    from llm_atlas.core import assets as core

    failed = False
    for asset in core.ASSETS.values():
        try:
            path = core.fetch(asset.name)
            if verify:
                core.verify(asset.name)
        except core.AssetError as error:  # the others may be had all the same
            typer.echo(f"llm-atlas: {error}", err=True)
            failed = True
            continue
        checked = ", sha256 right" if verify else ""
        typer.echo(
            f"{asset.name}  {asset.bytes / 1e6:.1f} MB, {asset.licence}{checked}\n  {asset.what}\n  {path}"
        )
    if failed:
        raise typer.Exit(1)


@app.command()
@_plainly
def concepts(
    chapter: Annotated[int | None, typer.Option(help="Only this chapter.")] = None,
    state: Annotated[State | None, typer.Option(help="Only concepts in this state.")] = None,
) -> None:
    """List the concepts of the book: chapter, id, state, name."""
    from llm_atlas.book.concepts import chapters, load_concepts

    last = chapters()[-1].number
    if chapter is not None and not 1 <= chapter <= last:
        raise ValueError(f"chapter {chapter} must be 1 to {last}")
    found = [
        concept
        for concept in load_concepts().values()
        if chapter in (None, concept.number) and state in (None, concept.state)
    ]
    width = max((len(concept.id) for concept in found), default=0)
    for concept in found:
        typer.echo(f"{concept.number:2}  {concept.id:{width}}  {concept.state:7}  {concept.name}")
    typer.echo(f"{len(found)} of {len(load_concepts())} concepts")


@app.command()
@_plainly
def course(
    numbers: Annotated[
        list[int] | None, typer.Argument(help="The chapters, by number; all written ones if none is given.")
    ] = None,
    output: Annotated[Path, typer.Option(help="The folder that becomes the course.")] = Path("_build/course"),
    folder: Annotated[Path, typer.Option(help="Where the chapters' notebooks are.")] = Path("chapters"),
) -> None:
    """Write chapters as nbgrader assignments: for the students, for the instructor, with points and a plan."""
    from llm_atlas.book.course import EXAMPLE_POINTS, FRESH_POINTS, prerequisites, write_course

    exercises = write_course(output, numbers or (), folder=folder)
    for number, rows in exercises.items():
        points = len(rows) * (EXAMPLE_POINTS + FRESH_POINTS)
        typer.echo(f"chapter {number}: {len(rows)} exercises, {points} points")
    for number, missing in prerequisites(list(exercises)).items():
        needed = " and ".join(f"chapter {m}" for m in missing)
        typer.echo(f"chapter {number} builds on {needed}, which this course leaves out")
    typer.echo(f"{output}: release/ is for students, source/ for you; README.md says how to grade")


if __name__ == "__main__":
    app()
