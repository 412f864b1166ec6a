"""The program of the Flex Template: `embed` on Dataflow, with the template's parameters as options."""

import os
import sys
from collections.abc import Sequence

SWITCHES = ("full", "gpu_everywhere")
"""Options without a value; as parameters they are `true` or `false`."""

LISTS = ("input", "text_field")
"""Options that may be repeated; as parameters their values are parted by commas.

`keep_fields` parts its fields by commas itself, and types such as decimal128(5,2) hold some: its value stays whole.
"""


def options_of(parameters: Sequence[str], image: str) -> list[str]:
    """Returns the options of `embed`.

    Args:
      parameters: what the launcher gives, each `--name=value`: the template's parameters, and options of Beam.
      image: the workers' image unless the parameters name one; empty for none.

    Raises:
      ValueError: a switch is neither true nor false.
    """
    options = []
    for parameter in parameters:
        name, _, value = parameter.removeprefix("--").partition("=")
        if name in SWITCHES:
            if value not in ("true", "false"):
                raise ValueError(f"parameter {name} must be true or false, not {value!r}")
            options += [f"--{name}"] if value == "true" else []
        elif name in LISTS:
            options += [f"--{name}={part.strip()}" for part in value.split(",")]
        elif name != "runner":
            options.append(parameter)
    if image and not any(option.startswith("--sdk_container_image") for option in options):
        options.append(f"--sdk_container_image={image}")
    return ["--runner=dataflow", *options]


def main() -> int:
    """Describes the job for the launcher, which starts it once this program has ended."""
    from pipeline.__main__ import main as run

    return run(["embed", *options_of(sys.argv[1:], os.environ.get("SDK_CONTAINER_IMAGE", ""))])


if __name__ == "__main__":
    sys.exit(main())
