"""The ``stmae`` command: finds the subcommand, makes its configuration from the command line, runs it."""

import contextlib
import difflib
import importlib
import os
import signal
import sys

COMMANDS = {  # name: (module with Config and run, what it does)
    "pretrain": ("pretrain", "pre-train a masked autoencoder on a folder or list of videos"),
    "finetune": ("finetune", "train a classifier from a pre-trained model on labelled videos"),
    "finetune detector": ("finetune_detector", "train an action detector from a pre-trained model on AVA's boxes"),
    "test": ("test", "measure a classifier's accuracy on videos, in several views each"),
    "test detector": ("test_detector", "measure an action detector's mean average precision on AVA's boxes"),
    "probe": ("probe", "nearest neighbours, a linear and an attentive classifier on frozen features"),
    "features": ("features", "write a frozen encoder's features of videos to a file"),
    "plan": ("plan", "batch, learning rate, steps, memory and command of a recipe on the GPUs that there are"),
    "reconstruct": ("reconstruct", "pictures of what a pre-trained model makes of a video"),
    "data check": ("data_check", "list the videos that cannot be used and why, and summarise the others"),
    "data prepare": (
        "data_prepare",
        "encode videos once more, small, so that clips of them cost little to decode",
    ),
    "convert": ("convert", "convert weights between code bases, and report what was recognised and assumed"),
    "demo": ("demo", "pre-train a small model on clips that ship with the package, and show what it learnt"),
}


def main(argv=None):
    """Runs ``stmae ARGV``; returns the exit status. Errors that a user can act on are one line; STMAE_TRACEBACK=1 shows
    where they arose."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        from stmae import __version__

        print(f"stmae {__version__}")
        return 0
    count = 2 if " ".join(argv[:2]) in COMMANDS else 1
    command, arguments, argv = " ".join(argv[:count]), argv, argv[count:]
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, 1) or difflib.get_close_matches(" ".join(arguments[:2]), COMMANDS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        print(f"stmae: there is no command {command!r}{hint}\n\n{usage()}", file=sys.stderr)
        return 2
    if command.startswith("data ") and argv and not argv[0].startswith("-"):
        argv = ["--data", *argv]
    if command == "convert" and len(argv) > 1 and not any(word.startswith("-") for word in argv[:2]):
        argv = ["--input", argv[0], "--output", *argv[1:]]

    name, description = COMMANDS[command]
    try:
        from . import config as configuration

        importlib.import_module("jsonargparse")  # which parse needs
        module = importlib.import_module(f".commands.{name}", __package__)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "stmae":
            raise
        print(f"stmae {command} needs the package {error.name!r}: pip install 'stmae[train]'", file=sys.stderr)
        return 1

    from stmae.checkpoint import CheckpointError, CheckpointMismatch

    from .data.dataset import worker_died
    from .data.video import VideoError
    from .engine.distributed import ProcessLostError
    from .engine.run_folder import RunFolderError

    config = configuration.parse(module.Config, argv, prog=f"stmae {command}", description=description.capitalize() + ".")
    try:
        result = module.run(config)
    except BrokenPipeError:
        raise
    except (
        ValueError,
        OSError,
        CheckpointError,
        CheckpointMismatch,
        ProcessLostError,
        RunFolderError,
        VideoError,
        *getattr(module, "ERRORS", ()),
    ) as error:
        if os.environ.get("STMAE_TRACEBACK"):
            raise
        print(f"stmae {command}: {error}", file=sys.stderr)
        return getattr(error, "exit_status", 1)
    except RuntimeError as error:
        if os.environ.get("STMAE_TRACEBACK") or not worker_died(error):
            raise
        print(f"stmae {command}: {error}; there may be too little memory for this many workers", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"stmae {command}: interrupted", file=sys.stderr)
        return 130
    return module.exit_status(config, result) if result is not None and hasattr(module, "exit_status") else 0


def entry_point():
    """The ``stmae`` program. Where its output is closed, as in ``stmae --help | head -1``, it ends as other programs do."""
    end_process_with(main_of_pipe)


def main_of_pipe():
    try:
        try:
            status = main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python tries once more at its end
        return 128 + signal.SIGPIPE
    return status


def end_process_with(function):
    """Calls ``function`` and ends the process with the status that it returns.

    A process of a distributed run ends without finalizing the interpreter. Its log, writers, data workers and process group have
    ended by then, but torch's caches for sharded tensors keep gloo's threads alive, and one that releases a Python object while
    the interpreter is finalized aborts the process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        sys.exit(function())
    try:
        status = function()
    except SystemExit:  # the parser's: nothing has begun
        raise
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a closed pipe
            stream.flush()
    os._exit(status)


def usage():
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {description}" for name, (_, description) in COMMANDS.items()]
    return "\n".join(["usage: stmae COMMAND [OPTIONS]", "", *lines, "", "'stmae COMMAND --help' lists a command's options."])


if __name__ == "__main__":
    entry_point()
