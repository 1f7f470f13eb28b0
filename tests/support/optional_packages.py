"""What a missing optional package means for the tests and benches that import it."""

import pytest

# What the extras bring. Tests of the kernels, the ops and the models need none of it.
OPTIONAL = {
    "PIL", "av", "hypothesis", "jsonargparse", "matplotlib", "peft", "safetensors", "tensorboard", "torchcodec", "tqdm",
    "transformers", "yaml",
}  # fmt: skip


class Module(pytest.Module):
    """A test module; skipped, by the package's name, where it imports an optional one that is not installed."""

    def collect(self):
        try:
            return super().collect()
        except self.CollectError as error:
            missing = error.__cause__
            if isinstance(missing, ModuleNotFoundError) and (missing.name or "").partition(".")[0] in OPTIONAL | {"triton"}:
                pytest.skip(f"needs the package {missing.name}", allow_module_level=True)
            raise


def pytest_pycollect_makemodule(module_path, parent):
    return Module.from_parent(parent, path=module_path)
