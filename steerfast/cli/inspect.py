"""`steerfast inspect`."""

from __future__ import annotations

import click

from steerfast.cli import common, option
from steerfast.errors import ProfileError, SteerfastError


@click.command("inspect")
@option.profile_file
@option.value("--plot", option.FILE, "Draw the gates' figures and scores (.png, .svg or .pdf).", role="plot_file")
@option.json_file
def command(profile_file: str, plot_file: str | None, json_file: str | None) -> None:
    """Show the contents of a profile, or of each profile of a stack, and the figures of its gates.

    \b
    Example:
      steerfast inspect safety.safetensors
      steerfast inspect safety.safetensors --plot gates.png --json profile.json
    """
    common.check_outputs({"--plot": plot_file, "--json": json_file}, [profile_file])

    from rich.errors import NotRenderableError

    from steerfast.cli.rendering import by_source_tables, header, layer_table, undecided_table
    from steerfast.evaluation.description import summary
    from steerfast.profile import ProfileStack

    stack = ProfileStack.load(profile_file)
    if plot_file is not None and len(stack) > 1:
        raise click.UsageError(f"--plot: expected a profile, got a stack of {len(stack)}")
    try:  # figures of a calibration are JSON data that no reader of profiles checks
        parts = [summary(profile) for profile in stack]
        found = {"profile": profile_file, **(parts[0] if len(parts) == 1 else {"stack": parts})}
        tables = [
            table
            for profile in stack
            for table in (header(profile), layer_table(profile), undecided_table(profile), *by_source_tables(profile))
        ]
        if plot_file is not None:
            from steerfast.evaluation.plots import save_plot

            save_plot(stack[0], plot_file)
    except (AttributeError, LookupError, TypeError, ValueError, NotRenderableError) as error:
        if isinstance(error, SteerfastError):
            raise
        raise ProfileError(
            f"profile {profile_file!r}: its figures (fitted, calibration or tuned) are malformed ({error!r}); "
            "calibrate it again"
        ) from None
    common.write_json(json_file, found)
    console = common.console(json_file)
    for table in tables:
        if table is not None:
            console.print(table)
    if plot_file is not None:
        console.print(f"wrote {plot_file}", markup=False)
