"""`python -m mergekit_ace`: the command line, also where the startup hook does not run."""

from mergekit_ace.cli import main

if __name__ == "__main__":
    main(prog_name="mergekit-ace")
