"""The formulas of diffusion models, without state, in float64: the forward process of DDPM (Ho et al., 2020); and
objectives, what the network reads of clean latents x0 and noise n and what it should answer, as numbers for each row.

Shapes: B rows, C, H, W of the latents.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np

from dreambooth_ms.config.train import LossConfig
from dreambooth_ms.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class NoiseScheduleSpec:
    """The forward process the model was trained with, by the keys of diffusers' schedulers."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: Literal["scaled_linear", "linear", "squaredcos_cap_v2"] = "scaled_linear"
    """"squaredcos_cap_v2" reads neither `beta_start` nor `beta_end`."""
    trained_betas: tuple[float, ...] | None = None
    """In place of those that `beta_schedule` makes, one for each timestep."""
    rescale_betas_zero_snr: bool = False
    """Whether the last timestep holds no signal (Lin et al., 2024)."""
    prediction_type: str = "epsilon"
    """What the UNet predicts: the noise, or the velocity, "v_prediction" (Salimans and Ho, 2022)."""


@dataclass(frozen=True)
class NoiseSchedule:
    """x_t = signal_t x_0 + noise_t eps (eq. 4), with signal_t^2 + noise_t^2 = 1."""

    alphas_cumprod: np.ndarray
    """(T,) float64: the products written alpha-bar in the paper, from 0 (almost clean) to T - 1 (almost noise)."""

    @classmethod
    def from_spec(cls, spec: NoiseScheduleSpec) -> "NoiseSchedule":
        """Of a model folder; ConfigError if the betas are none, or noise is predicted where there is nothing else."""
        betas, count = _betas(spec), spec.num_train_timesteps
        if len(betas) != count or count < 2 or not (betas.min() > 0 and betas[:-1].max() < 1 >= betas[-1]):
            raise ConfigError(
                f"betas: expected one above 0 and below 1 for each of {count} timesteps, got {len(betas)} from "
                f"{betas.min(initial=1):g} to {betas.max(initial=0):g}; take the scheduler of the original model"
            )
        alphas_cumprod = np.cumprod(1 - betas)
        if spec.rescale_betas_zero_snr:
            # Algorithm 1 of Lin et al.: the first stays as it is, the last becomes 0.
            root = np.sqrt(alphas_cumprod)
            alphas_cumprod = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        if alphas_cumprod[-1] == 0 and spec.prediction_type == "epsilon":
            raise ConfigError(
                "prediction_type epsilon with zero terminal SNR (rescale_betas_zero_snr): no picture follows from the "
                "noise where there is nothing else; give --prediction_type v_prediction"
            )
        return cls(alphas_cumprod)

    def signal(self, timesteps: np.ndarray) -> np.ndarray:
        """Factor of the clean latents at these timesteps."""
        return np.sqrt(self.alphas_cumprod[timesteps])

    def noise(self, timesteps: np.ndarray) -> np.ndarray:
        """Factor of the noise at these timesteps."""
        return np.sqrt(1 - self.alphas_cumprod[timesteps])

    def betas(self, least: float = 0.0) -> np.ndarray:
        """The betas (T,) float64 of these products, none of which is taken to be below `least`."""
        products = np.maximum(self.alphas_cumprod, least)
        return 1 - products / np.append(1.0, products[:-1])


def _betas(spec: NoiseScheduleSpec) -> np.ndarray:
    """(T,) float64. `scaled_linear` is linear in the square root of beta (latent diffusion); `squaredcos_cap_v2` is the
    cosine of Nichol and Dhariwal (2021, eq. 17), where no beta is above 0.999."""
    if spec.trained_betas is not None:
        return np.array(spec.trained_betas, np.float64)
    if spec.beta_schedule == "squaredcos_cap_v2":
        times = np.arange(spec.num_train_timesteps + 1) / spec.num_train_timesteps
        products = np.cos((times + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - products[1:] / products[:-1], 0.999)
    power = {"linear": 1, "scaled_linear": 2}.get(spec.beta_schedule)
    if power is None:
        said = f"beta_schedule {spec.beta_schedule!r}"
        raise ConfigError(f"{said}: expected scaled_linear, linear or squaredcos_cap_v2")
    start, end = (max(beta, 0.0) ** (1 / power) for beta in (spec.beta_start, spec.beta_end))
    return np.linspace(start, end, spec.num_train_timesteps, dtype=np.float64) ** power


@dataclass(frozen=True, kw_only=True)
class EdmSpec:
    """The formulation of Karras et al. (2022) that a model was trained in, by the keys of diffusers' EDM schedulers."""

    num_train_timesteps: int = 1000
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    """The deviation of the clean latents."""
    rho: float = 7.0
    sigma_schedule: Literal["karras", "exponential"] = "karras"
    prediction_type: str = "epsilon"

    def __post_init__(self) -> None:
        """Raise ConfigError if there are no such noise levels."""
        if not (0 < self.sigma_min < self.sigma_max and self.sigma_data > 0 and self.rho > 0):
            raise ConfigError(
                f"sigma_min {self.sigma_min:g}, sigma_max {self.sigma_max:g}, sigma_data {self.sigma_data:g}, rho "
                f"{self.rho:g}: expected numbers above 0, and a larger sigma_max; take the original model's scheduler"
            )

    @property
    def sigmas(self) -> np.ndarray:
        """(T,) float64: the noise levels that diffusers' script draws from, the least first (eq. 5; T steps from
        sigma_max to sigma_min, which itself is not drawn)."""
        u = np.arange(self.num_train_timesteps - 1, -1, -1) / self.num_train_timesteps
        if self.sigma_schedule == "exponential":
            return self.sigma_max * (self.sigma_min / self.sigma_max) ** u
        least, most = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (most + u * (least - most)) ** self.rho


@dataclass(frozen=True)
class Columns:
    """The rows of a batch, each field (B,) float64: network input = in_x x0 + in_n n, target = out_x x0 + out_n n."""

    in_x: np.ndarray
    in_n: np.ndarray
    out_x: np.ndarray
    out_n: np.ndarray
    time: np.ndarray
    """The timestep that the network reads, which need not be whole."""
    weight: np.ndarray
    """Of the row's error: the mean squared difference of prediction and target."""
    huber_c: np.ndarray | None = None
    """Above which differences count in proportion, no longer squared (`pseudo_huber`); None: all are squared."""

    @property
    def snr(self) -> np.ndarray:
        """The ratio of signal to noise in what the network reads, for clean latents of deviation 1."""
        return (self.in_x / self.in_n) ** 2

    def network_input(self, clean_BCHW: np.ndarray, noise_BCHW: np.ndarray) -> np.ndarray:
        """What the network reads (B, C, H, W) float32."""
        return _mixture(self.in_x, clean_BCHW, self.in_n, noise_BCHW)

    def target(self, clean_BCHW: np.ndarray, noise_BCHW: np.ndarray) -> np.ndarray:
        """What it should answer (B, C, H, W) float32."""
        return _mixture(self.out_x, clean_BCHW, self.out_n, noise_BCHW)


def _mixture(x_B: np.ndarray, clean_BCHW: np.ndarray, n_B: np.ndarray, noise_BCHW: np.ndarray) -> np.ndarray:
    x, n = (factor_B[:, None, None, None] for factor_B in (x_B, n_B))
    return (x * clean_BCHW + n * noise_BCHW).astype(np.float32)


def epsilon_at(schedule: NoiseSchedule, timesteps_B: np.ndarray) -> Columns:
    """x_t = signal x0 + noise n (Ho et al., 2020, eq. 4), and the noise n; all rows weigh 1."""
    signal, noise = schedule.signal(timesteps_B), schedule.noise(timesteps_B)
    zeros = np.zeros(len(signal))
    return Columns(signal, noise, zeros, zeros + 1, timesteps_B.astype(np.float64), zeros + 1)


def velocity_at(schedule: NoiseSchedule, timesteps_B: np.ndarray) -> Columns:
    """The same x_t, and the velocity signal n - noise x0 (Salimans and Ho, 2022, section 4)."""
    columns = epsilon_at(schedule, timesteps_B)
    return replace(columns, out_x=-columns.in_n, out_n=columns.in_x)


def edm_at(spec: EdmSpec, sigmas_B: np.ndarray) -> Columns:
    """y = x0 + sigma n, times c_in, and the F with which c_skip y + c_out F is x0 (Karras et al., 2022, table 1). All
    rows weigh 1, the paper's lambda (sigma) of the clean latents. For v_prediction, c_out has the other sign."""
    power = sigmas_B**2 + spec.sigma_data**2
    c_in, c_skip = power**-0.5, spec.sigma_data**2 / power
    c_out = sigmas_B * spec.sigma_data * c_in * (-1 if spec.prediction_type == "v_prediction" else 1)
    out_x, out_n = (1 - c_skip) / c_out, -c_skip * sigmas_B / c_out
    return Columns(c_in, c_in * sigmas_B, out_x, out_n, np.log(sigmas_B) / 4, np.ones(len(sigmas_B)))


def weighed_as_clean(columns: Columns, weight_B: np.ndarray | float) -> Columns:
    """Rows whose errors of the clean latents weigh so much. The input is known, so an error of the clean latents is one
    of the target, times (in_n out_x - out_n in_x) / in_n."""
    target_per_clean = (columns.in_n * columns.out_x - columns.out_n * columns.in_x) / columns.in_n
    return replace(columns, weight=columns.weight * weight_B / target_per_clean**2)


def min_snr(columns: Columns, gamma: float) -> Columns:
    """Weights that count errors of the clean latents by min(SNR, gamma) (Hang et al., 2023): min(SNR, gamma) / SNR
    where the noise is predicted, and min(SNR, gamma) / (SNR + 1) where the velocity is."""
    return weighed_as_clean(columns, np.minimum(columns.snr, gamma))


def debiased(columns: Columns) -> Columns:
    """Weights 1 / sqrt(SNR) where the noise is predicted (Yu et al., 2023), 1 / (SNR + 1) where the velocity is, as
    kohya's scripts have both; an SNR above 1000 counts as 1000."""
    snr = np.minimum(columns.snr, 1000)
    return replace(columns, weight=columns.weight / np.where(columns.out_x == 0, np.sqrt(snr), snr + 1))


HUBER_SCHEDULES: dict[str, Callable[[Columns, float, int], np.ndarray]] = {
    "constant": lambda columns, c, steps: np.full_like(columns.time, c),
    "exponential": lambda columns, c, steps: c ** (columns.time / steps),
    # 1 / (1 + sigma), where no signal is left, too.
    "snr": lambda columns, c, steps: c + (1 - c) * (columns.in_x / (columns.in_x + columns.in_n)) ** 2,
}
"""Columns, the least c, number of timesteps -> c of each row (Khrapov et al., 2024)."""


def pseudo_huber(columns: Columns, kind: Literal["huber", "smooth_l1"], c_B: np.ndarray) -> Columns:
    """Differences d of prediction and target that count by 2 c (sqrt(d^2 + c^2) - c) in place of d^2 (Charbonnier et
    al., 1997), or for smooth_l1 by that over c, as kohya's scripts have both."""
    weight = columns.weight / c_B if kind == "smooth_l1" else columns.weight
    return replace(columns, huber_c=c_B, weight=weight)


def timestep_shares(loss: LossConfig, count: int) -> np.ndarray:
    """The probability of each of so many timesteps (T,), 0 outside of the range, of the preferred ones times as high,
    by the strategies of diffusers' text-to-image script for SDXL."""
    timesteps, portion = np.arange(count), int(loss.timestep_bias_portion * count)
    preferred = {
        "none": timesteps < 0,
        "earlier": timesteps < portion,
        "later": timesteps >= count - portion,
        "range": (timesteps >= loss.timestep_bias_begin) & (timesteps < loss.timestep_bias_end),
    }[loss.timestep_bias_strategy]
    drawn = (timesteps >= loss.min_timestep) & (timesteps < (loss.max_timestep or count))
    shares = drawn * np.where(preferred, loss.timestep_bias_multiplier, 1.0)
    return shares / shares.sum()


def pyramid_noise(noise_CHW: np.ndarray, rng: np.random.Generator, rounds: int, discount: float) -> np.ndarray:
    """Noise with noise of lower resolutions in it, of deviation 1 (Whitaker, 2023, as kohya's scripts have it): round i
    adds noise of 1 / r^i of the size, r drawn evenly from 2 to 4, enlarged by bilinear interpolation, times discount^i;
    the last one is where a side is 1."""
    if not rounds:
        return noise_CHW
    channels, height, width = noise_CHW.shape
    total = noise_CHW.astype(np.float64)
    for number in range(rounds):
        factor = rng.uniform(2, 4) ** number
        small = max(1, int(height / factor)), max(1, int(width / factor))
        rows, columns = map(_enlarging, small, (height, width))
        total += discount**number * (rows @ rng.standard_normal((channels, *small)) @ columns.T)
        if 1 in small:
            break
    return (total / total.std(ddof=1)).astype(np.float32)


def _enlarging(small: int, large: int) -> np.ndarray:
    """(large, small): linear interpolation between the centres of pixels, and at the edges the nearest."""
    return _interpolating(np.clip((np.arange(large) + 0.5) * small / large - 0.5, 0, small - 1), small)


def _interpolating(places: np.ndarray, size: int) -> np.ndarray:
    return np.maximum(0, 1 - np.abs(places[:, None] - np.arange(size)))


def low_resolution(
    schedule: NoiseSchedule, levels_B: np.ndarray, small_BChw: np.ndarray, noise_BCHW: np.ndarray
) -> np.ndarray:
    """Small pictures, enlarged to the size of their noise and noisy at timesteps of their own (B, C, H, W) float32: a
    second stage reads them behind its own noisy pictures, with the timesteps as class labels (DeepFloyd IF's unet.py).
    Interpolation is bilinear and leaves the pixels of the corners there, as torch's `align_corners=True`."""
    sides = zip(small_BChw.shape[2:], noise_BCHW.shape[2:], strict=True)
    rows, columns = (_interpolating(np.linspace(0, small - 1, large), small) for small, large in sides)
    return epsilon_at(schedule, levels_B).network_input(rows @ small_BChw @ columns.T, noise_BCHW)


def perturbed(noise_CHW: np.ndarray, rng: np.random.Generator, gamma: float) -> np.ndarray:
    """n + gamma n', which the network reads in place of the noise n, which stays its target (Ning et al., 2023)."""
    return noise_CHW + gamma * rng.standard_normal(noise_CHW.shape, np.float32) if gamma else noise_CHW


OBJECTIVES: dict[str, Callable[[NoiseSchedule, np.ndarray], Columns]] = {
    "epsilon": epsilon_at,
    "v_prediction": velocity_at,
}
"""By the names of the schema (`config.choices.PredictionType`)."""

DEFAULT = LossConfig()
"""Squared errors, all rows weigh the same."""

LOGNORMAL = -1.2, 1.2
"""Mean and deviation of ln sigma in training (Karras et al., 2022, table 1)."""


def draw_columns(
    spec: NoiseScheduleSpec | EdmSpec, loss: LossConfig = DEFAULT, part: tuple[int, int] | None = None
) -> Callable[[Sequence[np.random.Generator]], Columns]:
    """The objective of a model: a generator for each row -> columns at drawn levels of noise. If `loss` says nothing,
    timesteps of the model's noise are drawn evenly (Ho et al., 2020, algorithm 1). With a `part`, its number and how
    many there are, the rows of all parts have one level of each of as many equal sections of the range, and those of a
    part are spread over the whole of it; no level is preferred."""
    count, is_edm = spec.num_train_timesteps, isinstance(spec, EdmSpec)
    if isinstance(spec, EdmSpec):
        levels, columns_at = spec.sigmas, partial(edm_at, spec)
    else:
        schedule = NoiseSchedule.from_spec(spec)
        levels, columns_at = np.arange(count), partial(OBJECTIVES[spec.prediction_type], schedule)
    low, high = loss.min_timestep, min(loss.max_timestep or count, count)
    shares = timestep_shares(loss, count) if loss.timestep_bias_strategy != "none" else None

    def level(rng: np.random.Generator) -> float:
        if is_edm and loss.edm_sampling == "lognormal":
            return float(np.exp(rng.normal(*LOGNORMAL)))
        return levels[rng.integers(low, high) if shares is None else rng.choice(count, p=shares)]

    def section(row: int, rows: int, rng: np.random.Generator, number: int, parts: int) -> float:
        return levels[low + int((high - low) * (row + (number + rng.random()) / parts) / rows)]

    def drawn(generators: Sequence[np.random.Generator]) -> Columns:
        own = enumerate(generators)
        found = [section(row, len(generators), rng, *part) if part else level(rng) for row, rng in own]
        columns = columns_at(np.array(found))
        if is_edm and loss.edm_weighting == "none":
            columns = weighed_as_clean(columns, 1.0)
        if loss.do_edm_style_training and not is_edm:
            # diffusers' 1 / sigma^2. Where the noise is predicted, all rows weigh 1 again.
            columns = weighed_as_clean(columns, columns.snr)
        if loss.snr_gamma:
            columns = min_snr(columns, loss.snr_gamma)
        if loss.debiased_estimation_loss:
            columns = debiased(columns)
        if loss.loss_type != "l2":
            c_B = HUBER_SCHEDULES[loss.huber_schedule](columns, loss.huber_c, count)
            columns = pseudo_huber(columns, loss.loss_type, c_B)
        return columns

    return drawn
