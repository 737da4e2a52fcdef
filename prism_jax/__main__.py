"""Start `prism_jax.main`."""

import os
import sys

from prism_jax import main
from prism_jax.setup import compilation_cache

if __name__ == "__main__":
    compilation_cache.set_default(os.environ)
    sys.exit(main.main(sys.argv[1:]))
