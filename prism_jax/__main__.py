"""Start `prism_jax.main`."""

import sys

from prism_jax import main

if __name__ == "__main__":
    sys.exit(main.main(sys.argv[1:]))
