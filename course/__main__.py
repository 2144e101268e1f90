"""The console command `labkit`: the command line, or a sentence where a package that it needs is not installed."""

import sys

from labkit import files


def main() -> None:
    """Run the command line; exit code 2, with what to install, where the packages of the extra `course` are missing."""
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
