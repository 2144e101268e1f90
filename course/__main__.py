"""The console command `labkit`: the command line, or a sentence if a package is missing."""

import sys

from labkit import files


def main() -> None:
    """Run the command line; without the packages of the extra `course`, name the command to install; exit code 2."""
    try:
        from course import cli

        cli.main()
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package in ("labkit", "course"):
            raise
        print(f"labkit: this needs {package}, which is not installed: {files.set_up_with('course')}.", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
