"""A bench for stochastic variational inference: each function returns a tidy DataFrame."""

from pyro_scanvi.experiments.amortisation import (
    FAMILIES,
    Diagonal,
    Fit,
    FullCovariance,
    amortisation_gaps,
    plot_amortisation_gaps,
)
from pyro_scanvi.experiments.comparing import (
    Settings,
    compare,
    plot_comparison,
    plot_differences,
)
from pyro_scanvi.experiments.gradients import (
    ESTIMATORS,
    DrawnLabels,
    gradient_noise,
    noise_summary,
    plot_gradient_noise,
)
from pyro_scanvi.experiments.intervals import (
    against,
    bootstrap_interval,
    markdown,
    summary,
    t_interval,
)
from pyro_scanvi.experiments.nuts import nuts_against_guide, plot_nuts_against_guide
from pyro_scanvi.experiments.tables import (
    MINIBATCHES,
    OBJECTIVES,
    OPTIMISERS,
    REGULARISATION,
    TABLES,
    WARM_UPS,
)

__all__ = [
    "ESTIMATORS",
    "FAMILIES",
    "MINIBATCHES",
    "OBJECTIVES",
    "OPTIMISERS",
    "REGULARISATION",
    "TABLES",
    "WARM_UPS",
    "Diagonal",
    "DrawnLabels",
    "Fit",
    "FullCovariance",
    "Settings",
    "against",
    "amortisation_gaps",
    "bootstrap_interval",
    "compare",
    "gradient_noise",
    "markdown",
    "noise_summary",
    "nuts_against_guide",
    "plot_amortisation_gaps",
    "plot_comparison",
    "plot_differences",
    "plot_gradient_noise",
    "plot_nuts_against_guide",
    "summary",
    "t_interval",
]
