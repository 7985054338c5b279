"""The Stack: the software pins of an image. ``containers/<name>.yaml`` beside ``containers/<name>.lock``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from launcher.preset.fields import Frozen, Name, Text, Word

Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
Package = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9+.-]*$")]
"""A Debian package."""
Version = Annotated[str, StringConstraints(pattern=r"^[0-9][A-Za-z0-9.!_-]*(\+[A-Za-z0-9.]+)?$")]
"""An exact version, without an operator: ``2.3.0``. A pin without local part also means builds with one (``2.13.0+cpu``)."""


class Debootstrap(Frozen):
    kind: Literal["debootstrap"]
    suite: Word
    """Debian release: ``bookworm``."""


class Docker(Frozen):
    kind: Literal["docker"]
    image: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._/:-]*$")]
    digest: Digest
    """Which image exactly; a tag alone is refused, since what it names changes."""


class LocalImage(Frozen):
    kind: Literal["localimage"]
    path: Text
    """A ``.sif`` file; its content is part of the image's identity."""


class Stack(Frozen):
    name: Name
    description: Text = ""
    base: Debootstrap | Docker | LocalImage = Field(discriminator="kind")
    python: Annotated[str, StringConstraints(pattern=r"^3\.\d+$")]
    """Minor version of the image's Python."""
    packages: dict[Package, Version]
    """The pins that ``%test`` imports and compares: distribution → exact version. The lock adds what they need."""
    cuda: Annotated[str, Field(pattern=r"^\d+\.\d+$")] | None = None
    """CUDA version that torch was built with; none: CPU."""
    minimum_driver: Annotated[str, Field(pattern=r"^\d+(\.\d+)*$")] | None = None
    debian_packages: list[Package] = []
    """Added to the base by apt: what Python and the kernels need."""
    attention: list[Literal["eager", "sdpa", "flash2", "flash3", "xformers", "flex"]] = ["eager", "sdpa"]
    """What this stack can do at all (the GPU decides too)."""
    parallelism: list[Literal["single", "ddp", "fsdp", "zero1", "zero2", "zero3", "device_map"]] = ["single", "ddp", "device_map"]
    notes: list[Text] = []

    @model_validator(mode="after")
    def _torch_pinned(self) -> Stack:
        if "torch" not in self.packages or "transformers" not in self.packages:
            raise ValueError("packages must pin torch and transformers")
        return self
