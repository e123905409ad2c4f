"""One recipe is one file; its file name is its name. `perfkit.recipes()` lists them.

Files of one's own are found in the folders that the environment variable PERFKIT_RECIPES names, joined as in PATH.
"""

import os
import sys
import types

if __name__ != "perfkit.recipes":
    raise ImportError(f"import perfkit.recipes, not {__name__!r}: the repository root is on sys.path")


__path__ += filter(None, os.environ.get("PERFKIT_RECIPES", "").split(os.pathsep))


class _Recipes(types.ModuleType):
    def __call__(self):
        """Every recipe there is: name, one line, stage, frameworks, options."""
        from perfkit._recipe_files import catalog

        return catalog()


sys.modules[__name__].__class__ = _Recipes
