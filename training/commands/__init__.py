"""The subcommands of ``stmae``, one a module, each with ``Config`` and ``run``. A command never imports a command."""
