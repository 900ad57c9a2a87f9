"""`steerfast inspect`."""

from __future__ import annotations

import click

from steerfast.cli import common


@click.command("inspect")
@click.argument("profile_file", metavar="PROFILE")
@click.option("--plot", "plot_file", metavar="FILE", help="Draw the gates' figures and scores (.png, .svg or .pdf).")
@common.json_option
def command(profile_file: str, plot_file: str | None, json_file: str | None) -> None:
    """Show the contents of a profile and the figures of its gates.

    \b
    Example:
      steerfast inspect safety.safetensors
      steerfast inspect safety.safetensors --plot gates.png --json profile.json
    """
    common.check_outputs({"--plot": plot_file, "--json": json_file}, [profile_file])
    profile = common.load_profile(profile_file)

    from steerfast.cli.rendering import by_source_tables, header, layer_table, undecided_table
    from steerfast.evaluation.description import summary

    if plot_file is not None:
        from steerfast.evaluation.plots import save_plot

        save_plot(profile, plot_file)
    common.write_json(json_file, {"profile": profile_file, **summary(profile)})
    console = common.console(json_file)
    console.print(header(profile))
    console.print(layer_table(profile))
    for table in (undecided_table(profile), *by_source_tables(profile)):
        if table is not None:
            console.print(table)
    if plot_file is not None:
        console.print(f"wrote {plot_file}", markup=False)
