"""Stand in for hyper_parallel, which PyNative mode of MindFormers 2.1 imports and no package index has.

Every name is an empty class. Networks on one device never call into it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types


class _Module(types.ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {"__module__": self.__name__, "__init__": lambda self, *args, **options: None})
        setattr(self, name, made)
        return made


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        mine = name.partition(".")[0] == "hyper_parallel"
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if mine else None

    def create_module(self, spec):
        return _Module(spec.name)

    def exec_module(self, module):
        module.__path__ = []


def install() -> None:
    """Make ``import hyper_parallel...`` work."""
    sys.meta_path.insert(0, _Finder())
