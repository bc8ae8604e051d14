"""The command line: each command reads its options, calls one public function and prints what it returns.

Exit codes: 0 done, 1 an error (or ``verify`` beyond its tolerance, ``bench`` of what is not the same), 2 wrong usage, 130 interrupted.
``run``, ``inspect``, ``profile`` and ``serve`` need neither PyTorch nor the compiler: what a command needs is imported when it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tvmtrain.console import Console, flops, number, percent, size
from tvmtrain.contestant import GPU_PEERS, GRAPH, PEERS
from tvmtrain.errors import InputError, RemoteError, TvmtrainError
from tvmtrain.spec import OPTIMIZERS, Optimizer

if TYPE_CHECKING:
    from tvmtrain.artifact import Manifest
    from tvmtrain.data import Data
    from tvmtrain.fleet import Fleet
    from tvmtrain.jobs import Job
    from tvmtrain.remote import Board
    from tvmtrain.runtime import TrainStep
    from tvmtrain.training import Run, Settings

LOSSES = ("cross_entropy", "mse", "bce_with_logits")
INTERRUPTED = 130
PAUSE = 10.0  # seconds between two attempts to find a lost board
SAVE_EVERY = 100  # steps between two checkpoints that come home from a board, unless --save-every says
UNITS = {"KB": 2**10, "MB": 2**20}
MODEL_HELP = "package.module:factory, path/to/file.py:factory, or a .pt2 or .onnx file"


@dataclass(frozen=True)
class Outcome:
    """What a command returns: its exit code and, for --json, its result."""

    code: int
    result: dict[str, Any] | list[dict[str, Any]]


class UsageError(Exception):
    """Options that contradict each other."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (by default the process's) and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    options = parser.parse_args(arguments)
    options.argv = arguments
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own, about its own internals
            outcome = options.run(options, Console(sys.stderr if options.json else sys.stdout))
        if options.json:
            print(json.dumps(outcome.result, indent=1))
        return outcome.code
    except UsageError as error:
        parser.error(f"{options.command}: {error}")
    except BrokenPipeError:  # the reader of a pipe, as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        return _report(error)


def _report(error: Exception) -> int:
    """One readable message on standard error."""
    if os.environ.get("TVMTRAIN_DEBUG") == "1":
        traceback.print_exception(error)
    elif isinstance(error, TvmtrainError):
        print(f"tvmtrain: error: {error}", file=sys.stderr)
    elif isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in ("torch", "onnx", "sklearn", "tvm"):
        print(f"tvmtrain: error: this command needs {error.name}: pip install 'tvmtrain[compile]'", file=sys.stderr)
    else:
        print(
            f"tvmtrain: unexpected {type(error).__name__}: {error} (TVMTRAIN_DEBUG=1 shows where)",
            file=sys.stderr,
        )
    return 1


# Options.


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tvmtrain", description="Compile the training step of a PyTorch model, and train with it where PyTorch is not."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_quickstart(commands)
    _add_compile(commands)
    _add_run(commands)
    _add_verify(commands)
    _add_inspect(commands)
    _add_profile(commands)
    _add_bench(commands)
    _add_tune(commands)
    _add_deploy(commands)
    _add_serve(commands)
    _add_devices(commands)
    return parser


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace, Console], Outcome], help: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document to standard output, messages to standard error"
    )
    parser.set_defaults(run=run)
    return parser


def _add_quickstart(commands: Any) -> None:
    parser = _command(commands, "quickstart", _quickstart, "fine-tune a small network on real digits, compiled and in PyTorch")
    parser.add_argument("-o", "--output", type=Path, default=Path("tvmtrain-quickstart"), help="folder (default: %(default)s)")


def _add_compile(commands: Any) -> None:
    parser = _command(commands, "compile", _compile, "compile a model's training step into a folder")
    _add_job(parser)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the artifact")
    parser.add_argument("--gradients", action="store_true", help="also compile an entry that returns every gradient")
    parser.add_argument("--summary", action="store_true", help="also count what a step costs, without and with the plan")


def _add_job(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--x",
        action="append",
        default=[],
        metavar="SHAPE[,DTYPE]",
        help="an input's shape, batch first: 8x3x96x96 or 8x128,int64",
    )
    parser.add_argument("--batch", type=_positive, help="batch size, if another than the example's")
    parser.add_argument("--loss", choices=LOSSES, default="cross_entropy", help="(default: %(default)s)")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--train", action="store_const", const=True, dest="training", help="trace the model in training mode")
    mode.add_argument("--eval", action="store_const", const=False, dest="training", help="trace it in evaluation mode")
    optimizer = parser.add_argument_group("optimizer")
    optimizer.add_argument("--optimizer", choices=tuple(OPTIMIZERS), default="sgd", help="(default: %(default)s)")
    optimizer.add_argument("--lr", type=float, help="learning rate when a step is not given one")
    optimizer.add_argument("--momentum", type=float, help="of sgd")
    optimizer.add_argument("--nesterov", action="store_true", default=None, help="of sgd")
    optimizer.add_argument("--weight-decay", type=float)
    optimizer.add_argument("--clip-norm", type=float, help="bound of the norm of all gradients together")
    parser.add_argument("--device", default="host", help="a name from `tvmtrain devices` (default: %(default)s)")
    parser.add_argument("--plan", type=Path, help="update plan (TOML): what is trained")
    parser.add_argument("--arena", type=_bytes, metavar="SIZE", help="what intermediate tensors may take at once: 256KB, 1.5MB")
    parser.add_argument("--seed", type=int, default=0, help="of random weights and Dropout (default: %(default)s)")


def _add_run(commands: Any) -> None:
    parser = _command(commands, "run", _run, "train or evaluate a compiled step on data")
    parser.add_argument("artifact", metavar="ARTIFACT", type=Path, help="folder that `tvmtrain compile` wrote")
    _add_data(parser)
    training = parser.add_argument_group("training")
    training.add_argument(
        "--epochs", type=_positive, default=1, help="from the very first step, before a resume too (default: 1)"
    )
    training.add_argument("--lr", type=float, help="learning rate (default: the artifact's)")
    training.add_argument(
        "--schedule", choices=("constant", "cosine", "step"), default="constant", help="(default: %(default)s)"
    )
    training.add_argument(
        "--step-size", type=_positive, default=1, help="epochs between two drops of --schedule step (default: 1)"
    )
    training.add_argument("--gamma", type=float, default=0.1, help="factor of a drop (default: %(default)s)")
    training.add_argument("--warmup", type=_whole, default=0, help="steps until the full rate is reached (default: 0)")
    training.add_argument("--shuffle", action="store_true", help="another order in every epoch")
    training.add_argument("--seed", type=_whole, default=0, help="of that order (default: 0)")
    training.add_argument("--eval", action="store_true", help="evaluate only")
    files = parser.add_argument_group("files")
    files.add_argument("--save", type=Path, metavar="FILE", help="checkpoint, written after every epoch")
    files.add_argument("--save-every", type=_positive, default=0, metavar="N", help="and every N steps")
    files.add_argument("--resume", type=Path, metavar="FILE", help="go on from this checkpoint, in the middle of an epoch too")
    files.add_argument(
        "--weights", type=Path, metavar="FILE", help="write the final weights under PyTorch's names (safetensors)"
    )
    _add_threads(parser)
    board = _add_board(parser)
    board.add_argument(
        "--retries", type=_whole, default=5, help="attempts to go on when the board is lost, 10 s apart (default: %(default)s)"
    )


def _add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=_positive, help="threads to compute with (default: all physical cores)")
    parser.add_argument("--cores", type=_cores, metavar="LIST", help="processors they may run on: 0,2 or 4-7 (default: all)")


def _add_board(parser: argparse.ArgumentParser) -> Any:
    board = parser.add_argument_group("a board on the network", "on which `tvmtrain serve` or tvmtrain-serve runs")
    board.add_argument("--rpc", metavar="HOST:PORT", help="of the board's server")
    board.add_argument("--rpc-tracker", metavar="HOST:PORT", help="of a tracker that has boards: any free one")
    board.add_argument("--key", "--rpc-key", default="", help="that the server was started with")
    return board


def _add_serve(commands: Any) -> None:
    parser = _command(
        commands, "serve", _serve, "let others train on this machine: TVM's RPC server, which runs code for whoever reaches it"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all of this machine's (default: %(default)s)"
    )
    parser.add_argument("--port", type=_port, default=9090, help="0: any that is free (default: %(default)s)")
    parser.add_argument("--key", default="", help="that clients have to know; with a tracker, the kind of board")
    parser.add_argument(
        "--tracker", metavar="HOST:PORT", help="of TVM's tracker (python -m tvm.exec.rpc_tracker), to be found there"
    )
    parser.add_argument("--emulated", action="store_true", help="tell clients that times of this machine mean nothing")
    parser.add_argument("--log", type=Path, metavar="FILE", help="also write there what happens; clients' errors name it")
    _add_threads(parser)


def _add_data(parser: argparse.ArgumentParser, required: bool = True) -> None:
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        type=Path,
        required=required,
        help="an .npz file with x and y, a folder of images per class, or a board's .safetensors file",
    )
    data.add_argument("--eval-data", type=Path, help="evaluate on this (default: x_test and y_test, or test/, of --data)")
    data.add_argument("--keys", metavar="x=NAME,y=NAME", type=_names, default={}, help="names of arrays in the .npz file")
    data.add_argument(
        "--mean", type=_numbers, default=(0.0,), help="subtracted from inputs (images: 0..1), one number per channel or one"
    )
    data.add_argument("--std", type=_numbers, default=(1.0,), help="inputs are divided by it after that")
    data.add_argument("--limit", type=_positive, metavar="N", help="use N samples, evenly spread, of each set")


def _add_verify(commands: Any) -> None:
    parser = _command(commands, "verify", _verify, "compare a model's compiled step with PyTorch")
    _add_job(parser)
    parser.add_argument("--steps", type=_positive, default=20, help="training steps to compare (default: %(default)s)")
    parser.add_argument(
        "--tolerance", type=float, default=1e-3, help="relative to a tensor's largest value (default: %(default)s)"
    )


def _add_inspect(commands: Any) -> None:
    parser = _command(commands, "inspect", _inspect, "show what a compiled step is")
    parser.add_argument("artifact", metavar="ARTIFACT", type=Path, help="folder that `tvmtrain compile` wrote, for any machine")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw live bytes over a training step: .svg, .png or .pdf")
    parser.add_argument("--against", type=Path, metavar="ARTIFACT", help="with --plot: draw this artifact's step before it")


def _add_profile(commands: Any) -> None:
    parser = _command(commands, "profile", _profile, "time each kernel of a compiled step, beside what this machine can do")
    parser.add_argument(
        "artifact", metavar="ARTIFACT", type=Path, help="folder that `tvmtrain compile` wrote, for this machine"
    )
    parser.add_argument("--repeat", type=_positive, default=30, metavar="N", help="steps to time (default: %(default)s)")
    _add_threads(parser)
    _add_board(parser)
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write one step for chrome://tracing or ui.perfetto.dev")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the kernels under the roofline: .svg, .png or .pdf")


def _add_bench(commands: Any) -> None:
    parser = _command(commands, "bench", _bench, "time a model's compiled step beside PyTorch's fastest (--lr is 1e-5 here)")
    _add_job(parser)
    parser.add_argument("--rounds", type=_positive, default=3, help="turns of each contestant (default: %(default)s)")
    parser.add_argument("--steps", type=_positive, default=30, help="steps on the clock in a turn (default: %(default)s)")
    parser.add_argument("--threads", type=_positive, default=2, help="of each contestant (default: %(default)s)")
    peers = f"{','.join(PEERS)} (-cl: channels last); with {GRAPH}, as a CUDA graph on a GPU (default: all)"
    parser.add_argument("--peers", type=_peers, metavar="NAMES", help=peers)
    _add_board(parser)
    parser.add_argument("--anyway", action="store_true", help="measure on a busy machine, too: the result says so")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the result as JSON")


def _add_tune(commands: Any) -> None:
    parser = _command(
        commands, "tune", _tune, "find the fastest schedule of each kernel on this machine, for every later build"
    )
    _add_job(parser)
    parser.add_argument("--minutes", type=_minutes, default=10.0, help="of the whole search (default: %(default)s)")
    parser.add_argument("--trials", type=_positive, metavar="N", help="at most so many (default: as many as there is time for)")
    parser.add_argument("--threads", type=_positive, help="that a kernel is timed with (default: all physical cores)")
    board = parser.add_argument_group("boards on the network", "of the kind of --device, that take trials side by side")
    board.add_argument(
        "--rpc-tracker", metavar="HOST:PORT", help="of the tracker that has them; each: tvmtrain serve --tracker .."
    )
    board.add_argument("--key", "--rpc-key", default="", help="that they have in common")
    parser.add_argument("--search-seed", type=_whole, default=0, help="of the decisions that are drawn (default: 0)")


def _add_deploy(commands: Any) -> None:
    parser = _command(commands, "deploy", _deploy, "pack a compiled step with all that a board needs to train")
    parser.add_argument("artifact", metavar="ARTIFACT", type=Path, help="folder that `tvmtrain compile --device NAME` wrote")
    parser.add_argument("--device", required=True, metavar="NAME", help="the board; `tvmtrain devices` lists them")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the bundle, a .tar.gz file")
    parser.add_argument(
        "--wheel",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a wheel of apache-tvm or apache-tvm-ffi for the board's processor (default: pip downloads them into a cache)",
    )
    _add_data(parser, required=False)


def _add_devices(commands: Any) -> None:
    _command(commands, "devices", _devices, "list the devices to compile for")


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"got {text}, wanted 1 or more")
    return value


def _port(text: str) -> int:
    if not 0 <= (value := int(text)) < 2**16:
        raise argparse.ArgumentTypeError(f"got {text}, wanted 0 to 65535")
    return value


def _cores(text: str) -> tuple[int, ...]:
    """``0,2,4-7`` as numbers."""
    found: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            found += range(int(first), int(last or first) + 1)
    except ValueError:
        found = []
    if not found or min(found) < 0 or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted numbers of processors, each once: 0,2 or 4-7")
    return tuple(found)


def _minutes(text: str) -> float:
    if not 0 < (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text}, wanted more than 0")
    return value


def _whole(text: str) -> int:
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"got {text}, wanted 0 or more")
    return value


def _bytes(text: str) -> int:
    unit = next((size for suffix, size in UNITS.items() if text.upper().endswith(suffix)), 1)
    try:
        count = int(float(text.upper().rstrip("KMB")) * unit)
    except (ValueError, OverflowError):
        count = 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a number of bytes, or one with KB or MB: 200000, 256KB, 1.5MB")
    return count


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted numbers with commas between: 0.485,0.456,0.406") from error


def _peers(text: str) -> tuple[str, ...]:
    if unknown := [name for name in text.split(",") if name not in GPU_PEERS]:
        raise argparse.ArgumentTypeError(f"got {', '.join(unknown)}, wanted some of {','.join(GPU_PEERS)}")
    return tuple(text.split(","))


def _names(text: str) -> dict[str, str]:
    pairs = [part.split("=") for part in text.split(",")]
    if any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted as in x=images,y=labels")
    return dict(pairs)


# compile


def _compile(options: argparse.Namespace, out: Console) -> Outcome:
    from tvmtrain import jobs

    compiled = jobs.compile_model(_job(options), options.output, out, summary=options.summary)
    if compiled.summary is not None:
        out.line(f"\n{compiled.summary}\n")
    inputs = ", ".join(f"{name} {what}" for name, what in compiled.inputs.items())
    out.line(f"{options.output}: {compiled.trained:,} of {compiled.parameters:,} parameters trained, {inputs}", style="bold")
    memory, folder = compiled.memory, shlex.quote(str(options.output))
    out.line(
        f"a step needs an arena of {size(memory.arena)}, {size(memory.saved_features + memory.saved_masks)} of it saved for a backward "
        f"of {flops(compiled.backward_flops)}"
    )
    out.line(f"by layer, and drawn: tvmtrain inspect {folder} --plot memory.svg")
    if compiled.runs_here:
        out.line(f"next: tvmtrain run {folder} --data DATA.npz --epochs 5 --save NOW.safetensors")
    else:
        out.line(f"next: tvmtrain deploy {folder} --device {compiled.device} --data DATA.npz -o {compiled.device}.tar.gz")
    return Outcome(0, compiled.to_dict())


def _job(options: argparse.Namespace) -> Job:
    from tvmtrain import jobs

    try:
        return jobs.Job(
            model=options.model,
            examples=tuple(jobs.Example.parse(text) for text in options.x),
            batch=options.batch,
            loss=options.loss,
            optimizer=_optimizer(options),
            device=options.device,
            plan=options.plan,
            arena=options.arena,
            training=options.training,
            seed=options.seed,
            gradients=getattr(options, "gradients", False),
        )
    except TvmtrainError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from error


def _optimizer(options: argparse.Namespace) -> Optimizer:
    kind = OPTIMIZERS[options.optimizer]
    names = ("lr", "momentum", "nesterov", "weight_decay", "clip_norm")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    known = {f.name for f in fields(kind)}
    if wrong := [f"--{name.replace('_', '-')}" for name in given if name not in known]:
        raise UsageError(f"{', '.join(wrong)}: not an option of --optimizer {options.optimizer}")
    return kind(**given)


# run


def _run(options: argparse.Namespace, out: Console) -> Outcome:
    from tvmtrain import training

    board = _board(options)
    step = _loaded(options, board)
    samples = _samples(options, step.manifest, out)
    if options.resume is not None:
        step.restore(options.resume)
    if options.eval:
        return _evaluate_only(step, samples, out)
    if samples.train is None:
        raise InputError(f"{options.data}: holds test samples only; add --eval, or give samples to train on")
    _say_start(options, step, samples, out)
    if board is not None:
        out.line(f"on board {board}, {board.facts.arch}{_emulated(board)}")
    try:
        run = training.fit(step, samples.train, samples.test, _settings(options, step.manifest.lr, board), out)
    except RemoteError as error:
        if error.saved is None:
            raise
        raise RemoteError(f"{error}; go on with: {_resume_command(options, str(error.saved))}") from error
    if options.weights is not None:
        training.export_weights(step, options.weights)
    _say_end(options, run, out)
    return Outcome(INTERRUPTED if run.interrupted else 0, run.to_dict())


def _board(options: argparse.Namespace) -> Board | None:
    """A session with the board that --rpc or --rpc-tracker names; None without."""
    if options.rpc is None and options.rpc_tracker is None:
        if options.key:
            raise UsageError("--key: needs --rpc or --rpc-tracker")
        return None
    from tvmtrain import remote

    if options.rpc is not None and options.rpc_tracker is not None:
        raise UsageError("--rpc, --rpc-tracker: want one of them")
    if options.rpc is not None:
        return remote.connect(options.rpc, options.key)
    return remote.connect_through(options.rpc_tracker, options.key)


def _loaded(options: argparse.Namespace, board: Board | None) -> TrainStep:
    """The artifact, started here or there."""
    from tvmtrain import runtime

    if board is not None:
        return board.load(options.artifact, options.threads, options.cores or ())
    return runtime.load(options.artifact, options.threads, options.cores)


def _restart(options: argparse.Namespace, board: Board) -> Callable[[], TrainStep]:
    """What starts the artifact on a board that came back. The session before ends first: a server has one at a time."""
    held: list[Board | None] = [board]

    def start() -> TrainStep:
        if held[0] is not None:
            held[0].close()
        held[0] = _board(options)
        return _loaded(options, held[0])

    return start


def _emulated(board: Board) -> str:
    return f" (emulated: {board.facts.emulated}; no times)" if board.facts.emulated else ""


def _home(options: argparse.Namespace) -> Path:
    """Where checkpoints of a run on a board come home to."""
    return options.save or options.artifact / "remote.safetensors"


def _samples(options: argparse.Namespace, manifest: Manifest, out: Console) -> Data:
    """The samples of --data, with those of --eval-data to evaluate on; what becomes of their images is said."""
    samples = _read_samples(options, manifest)
    for note in samples.notes:
        out.line(note)
    return samples


def _read_samples(options: argparse.Namespace, manifest: Manifest) -> Data:
    from tvmtrain import data

    how: dict[str, Any] = {"keys": options.keys, "normalization": data.Normalization(options.mean, options.std)}
    samples = data.load(options.data, manifest, **how)
    if options.eval_data is None:
        return samples.limited(options.limit)
    other = data.load(options.eval_data, manifest, **how)
    if samples.classes and other.classes and samples.classes != other.classes:
        raise InputError(f"{options.eval_data}: classes {other.classes} are not those of {options.data}: {samples.classes}")
    together = data.Data(samples.train, other.evaluation, samples.classes, samples.notes + other.notes)
    return together.limited(options.limit)


def _evaluate_only(step: Any, samples: Any, out: Console) -> Outcome:
    from tvmtrain import training

    score = training.evaluate(step, samples.evaluation, out)
    if score is None:
        return Outcome(INTERRUPTED, {"interrupted": True})
    out.line(training.score_line(score), style="bold")
    return Outcome(0, {"steps": step.steps, "loss": score.loss, "accuracy": score.accuracy, "samples": score.count})


def _settings(options: argparse.Namespace, lr: float, board: Board | None) -> Settings:
    from tvmtrain import training

    there: dict[str, Any] = {"save": options.save, "save_every": options.save_every}
    if board is not None:
        again = training.Recovery(_restart(options, board), options.retries, PAUSE, options.resume)
        there = {"save": _home(options), "save_every": options.save_every or SAVE_EVERY, "recovery": again}
        there["timed"] = not board.facts.emulated
    return training.Settings(
        epochs=options.epochs,
        rate=training.Rate(
            options.lr if options.lr is not None else lr, options.schedule, options.step_size, options.gamma, options.warmup
        ),
        shuffle=options.shuffle,
        seed=options.seed,
        rescue=options.artifact / "interrupted.safetensors",
        **there,
    )


def _say_start(options: argparse.Namespace, step: Any, samples: Any, out: Console) -> None:
    test = f", {len(samples.test)} to evaluate on" if samples.test is not None else ""
    out.line(f"{len(samples.train)} samples to train on{test}; batches of {step.manifest.batch}")
    if step.steps:
        out.line(f"resumed after step {step.steps}")
    if options.save is None and options.weights is None and options.rpc is None and options.rpc_tracker is None:
        out.line(
            "the trained weights will not be kept: add --save FILE (checkpoint) or --weights FILE (for PyTorch)", style="yellow"
        )


def _say_end(options: argparse.Namespace, run: Run, out: Console) -> None:
    if run.interrupted:
        out.line(f"interrupted after step {run.steps}; saved to {run.saved}", style="bold")
        out.line(f"go on with: {_resume_command(options, str(run.saved))}")
        return
    if run.loss is not None:
        accuracy = "" if run.accuracy is None else f", accuracy {percent(run.accuracy)}"
        time = "" if run.ms_per_step is None else f", {run.ms_per_step:.1f} ms per step"
        out.line(f"loss {number(run.loss)}{accuracy}{time}", style="bold")
    for path in (run.saved, options.weights):
        if path is not None:
            out.line(f"saved to {path}")


def _resume_command(options: argparse.Namespace, saved: str) -> str:
    """The command of this run with --resume set to ``saved``."""
    words = list(options.argv)
    if "--resume" in words:
        at = words.index("--resume")
        del words[at : at + 2]
    words = [word for word in words if not word.startswith("--resume=")]
    return shlex.join(["tvmtrain", *words, "--resume", saved])


# verify, inspect, profile, bench, tune, devices, quickstart


def _verify(options: argparse.Namespace, out: Console) -> Outcome:
    from tvmtrain import verify

    report = verify.verify_job(_job(options), steps=options.steps, tolerance=options.tolerance, out=out)
    verify.show(report, out)
    return Outcome(0 if report.passed else 1, report.to_dict())


def _inspect(options: argparse.Namespace, out: Console) -> Outcome:
    from tvmtrain import describe

    if options.against is not None and options.plot is None:
        raise UsageError("--against: needs --plot FILE")
    description = describe.describe(options.artifact)
    if options.plot is not None:
        describe.plot(options.artifact, options.plot, options.against)
    describe.show(description, out)
    if options.plot is not None:
        out.line(f"live bytes over a training step: {options.plot}")
    return Outcome(0, description.to_dict())


def _profile(options: argparse.Namespace, out: Console) -> Outcome:
    from tvmtrain import drawing, profile

    if options.plot is not None:
        drawing.kind_of(options.plot)  # before minutes have gone by
    how = {"repeat": options.repeat, "threads": options.threads, "cores": options.cores, "board": _board(options)}
    if options.plot is not None and how["board"] is not None:
        raise UsageError("--plot: what a board can do at best is not known")
    found = profile.profile(options.artifact, out, **how)
    profile.show(found, out)
    if isinstance(found, profile.Untimed):
        return Outcome(0, found.to_dict())
    if options.trace is not None:
        profile.write_trace(found, options.trace)
        out.line(f"one step for chrome://tracing: {options.trace}")
    if options.plot is not None:
        profile.plot(found, options.plot)
        out.line(f"kernels under the roofline: {options.plot}")
    return Outcome(0, found.to_dict())


def _bench(options: argparse.Namespace, out: Console) -> Outcome:
    from tvmtrain import artifact, bench, board_bench

    options.lr = bench.RATE if options.lr is None else options.lr
    figures = (options.rounds, options.steps)
    settings = bench.Settings(*figures, threads=options.threads, peers=options.peers, anyway=options.anyway)
    if (board := _board(options)) is not None:
        measured = board_bench.bench(_job(options), settings, board, out)
        board_bench.show(measured, out)
        if options.output is not None:
            artifact.write_file(options.output, json.dumps(measured.to_dict(), indent=1).encode())
        return Outcome(0, measured.to_dict())
    found = bench.bench(_job(options), settings, out)
    bench.show(found, out)
    if options.output is not None:
        artifact.write_file(options.output, json.dumps(found.to_dict(), indent=1).encode())
        out.line(f"saved to {options.output}")
    return Outcome(0 if found.sound else 1, found.to_dict())


def _tune(options: argparse.Namespace, out: Console) -> Outcome:
    from tvmtrain import jobs, tuner

    settings = tuner.Settings(options.minutes, options.trials, options.threads, options.search_seed)
    boards = _boards(options, out)
    with out.working(f"tracing {options.model}"):
        job = _job(options)
        graph = jobs.trace(job, jobs.prepare(job))
    found = tuner.tune(graph, options.device, settings, out, command=shlex.join(["tvmtrain", *options.argv]), boards=boards)
    tuner.show(found, out)
    return Outcome(INTERRUPTED if found.interrupted else 0, found.to_dict())


def _deploy(options: argparse.Namespace, out: Console) -> Outcome:
    from tvmtrain import artifact, deploy

    if options.data is None and options.eval_data is not None:
        raise UsageError("--eval-data: needs --data")
    samples = None
    if options.data is not None:
        manifest = artifact.read(options.artifact, foreign=True).manifest
        samples = _samples(options, manifest, out)
        _say_left_out(samples, manifest, out)
    with out.working(f"packing {options.artifact} for {options.device}"):
        bundle = deploy.deploy(options.artifact, options.device, options.output, options.wheel, samples)
    out.line(f"{bundle.path}: {size(bundle.packed)}, unpacked {size(bundle.unpacked)}, of which weights {size(bundle.weights)}")
    out.table(("file", ">bytes"), [(name, f"{count:,}") for name, count in bundle.files.items()])
    for note in bundle.notes:
        out.line(f"note: {note}")
    given = "train.safetensors" if samples is not None and samples.train is not None else "DATA.safetensors"
    out.line(f"next: scp {shlex.quote(bundle.path)} BOARD: and, there,")
    out.line(f"  tar xzf {shlex.quote(Path(bundle.path).name)} && cd {bundle.root}")
    out.line(f"  ./train.sh --data {given} --epochs 3 --shuffle --checkpoint now.safetensors --every 100 --resume")
    return Outcome(0, bundle.to_dict())


def _say_left_out(samples: Data, manifest: Manifest, out: Console) -> None:
    """As the board's runner will; fewer samples than a batch are enough to predict and to evaluate."""
    from tvmtrain import batches

    if samples.train is not None and len(samples.train) < manifest.batch:
        out.line(f"note: {len(samples.train)} samples are too few to train on: a batch is {manifest.batch}")
    elif samples.train is not None and (rest := batches.left_out(len(samples.train), manifest.batch)):
        out.line(rest)


def _boards(options: argparse.Namespace, out: Console) -> Fleet | None:
    """Those that --rpc-tracker has."""
    if options.rpc_tracker is None:
        return None
    from tvmtrain import fleet, targets

    with out.working(f"asking the boards of {options.rpc_tracker}"):
        found = fleet.gather(options.rpc_tracker, options.key, targets.load(options.device), options.threads)
    out.line(f"{len(found.names)} boards: {', '.join(found.names)}; {found.threads} threads")
    return found


def _serve(options: argparse.Namespace, out: Console) -> Outcome:
    if "tvm" not in sys.modules:
        # A server computes with what was compiled elsewhere.
        os.environ.setdefault("TVM_USE_RUNTIME_LIB", "1")
    from tvmtrain import remote, serve, session

    tracker = None if options.tracker is None else remote.Address.parse(options.tracker)
    log = str(options.log.resolve()) if options.log is not None else ""
    settings = session.Settings(options.threads, options.cores, options.emulated, log)
    serve.serve(options.host, options.port, options.key, tracker, settings, out)


def _devices(options: argparse.Namespace, out: Console) -> Outcome:
    from tvmtrain import describe

    found = describe.devices()
    describe.show_devices(found, out)
    return Outcome(0, [device.to_dict() for device in found])


def _quickstart(options: argparse.Namespace, out: Console) -> Outcome:
    from tvmtrain import quickstart

    result = quickstart.quickstart(options.output, out)
    quickstart.show(result, out)
    return Outcome(0, result.to_dict())
