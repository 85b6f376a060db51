# ---
# jupyter:
#   jupytext:
#     formats: ipynb
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # From a profile to a decision
#
# You have a GPU, two early-exit models and a load. Should you serve with early exits, cut the model at a fixed layer,
# or let HELIOS adapt? Ten cells from what a layer costs to an answer with its uncertainty.

# %%
import matplotlib.pyplot as plt
import numpy as np

from helios_sim.exits.joint import joint_exits
from helios_sim.exits.rule import PerToken
from helios_sim.exits.store import load_trace
from helios_sim.profile.composition import Composition
from helios_sim.profile.store import load_profile
from helios_sim.report.summary import comparisons
from helios_sim.report.table import print_table
from helios_sim.study.run import run
from helios_sim.study.schema import ArrivalsConfig, Config, LengthConfig, LengthsConfig, MixConfig, WorkloadConfig

profile = load_profile("opt-1.3b@a100-40gb")
print(profile.name, "-", profile.provenance.provenance_class.value, "from", profile.provenance.source)

# %% [markdown]
# ## 1. What an iteration costs
# A `Composition` says what an iteration holds; the profile prices it. Here: decode at three depths, by batch.


# %%
def decode_ms(layers: int, batch: int, context_tokens: int = 500) -> float:
    composition = Composition(
        bounds=(layers,),
        decode_tokens=np.array([[batch]]),
        decode_kv_tokens=np.array([[batch * context_tokens]]),
        sampled_tokens=np.array([batch]),
    )
    return float(profile.iteration_time_s(composition)[0]) * 1e3


batches = [1, 2, 4, 8, 16, 32, 64, 128, 256]
for layers in (6, 12, 24):
    plt.plot(batches, [decode_ms(layers, batch) for batch in batches], marker="o", label=f"{layers} layers")
plt.xscale("log", base=2)
plt.xlabel("requests in the batch")
plt.ylabel("decode iteration (ms)")
plt.title("OPT-1.3B on A100-40GB")
plt.legend()
plt.show()

# %% [markdown]
# ## 2. What fits
# Memory that the upper layers do not take holds more requests: weights once, KV for every token.

# %%
usable_bytes = 0.9 * profile.hardware.hbm_bytes - profile.activation_reserve_bytes
for layers in (6, 12, 24):
    kv_tokens = (usable_bytes - profile.weight_bytes(layers)) / profile.kv_bytes_per_token(layers)
    print(
        f"{layers:2d} layers: {profile.weight_bytes(layers) / 1e9:.2f} GB of weights, {kv_tokens / 1000:.0f} k tokens of KV"
    )

# %% [markdown]
# ## 3. Where tokens may leave
# The OPT pair's exits are fitted to published shares: class `published`. A measured trace drops in at the same place.

# %%
small, large = load_trace("opt-1.3b", "published"), load_trace("opt-6.7b", "published")
rule = PerToken(small.published_threshold)
print("exits of the small model:", small.exits, "and of the large one:", large.exits)
print("left at the first exit of either:", round(joint_exits(small, rule, large, rule).early_in_either, 3))
print("small model cut at layer 6 agrees with its full depth:", round(float(small.agree[:, 0].mean()), 3))

# %% [markdown]
# ## 4. The question as a study
# Arms see the same requests. The lengths are lognormal, the arrivals Poisson.


# %%
def study(rate_per_s: float, seeds: list[int]) -> Config:
    return Config(
        name="notebook",
        title=f"Four policies at {rate_per_s:g} requests/s",
        workload=WorkloadConfig(
            n_requests=150,
            arrivals=ArrivalsConfig(kind="poisson", rate_per_s=rate_per_s),
            lengths=LengthsConfig(
                prompt=LengthConfig(kind="lognormal", mean=400, sigma=0.5, maximum=1400),
                output=LengthConfig(kind="lognormal", mean=120, sigma=0.6, maximum=500),
            ),
            mix=MixConfig(tasks={"sharegpt": 0.5, "codexglue": 0.5}),
        ),
        arms={
            "full_depth": {"policy": "full_depth", "model": "opt-1.3b"},
            "early_exit": {"policy": "early_exit", "model": "opt-1.3b"},
            "static_cap": {"policy": "static_cap", "model": "opt-1.3b"},
            "helios": {"policy": "helios", "constants": "batch_scaled"},
        },
        baseline="full_depth",
        subject="helios",
        seeds=seeds,
        headline_metrics=["e2e_s_mean", "ttft_s_p95", "throughput_requests_per_s", "layers_per_token", "agreement"],
    )


result = run(study(10.0, seeds=[0, 1]))
print_table(result, comparisons(result))

# %% [markdown]
# ## 5. The answer in words

# %%
print("\n".join(result.verdict))

# %% [markdown]
# ## 6. What the policy decided, and why

# %%
for decision in result.arms["helios"].decisions[:6]:
    print(f"{decision.time_ns / 1e9:7.2f} s  {decision.deployment.reason}")

# %% [markdown]
# ## 7. Does it hold at another load?

# %%
rates = [2.0, 8.0, 24.0]
by_rate = {rate: run(study(rate, seeds=[0])) for rate in rates}
for arm in result.arms:
    plt.plot(rates, [by_rate[rate].arms[arm].metrics["e2e_s_mean"] for rate in rates], marker="o", label=arm)
plt.xlabel("arrivals (requests/s)")
plt.ylabel("mean end-to-end time (s)")
plt.yscale("log")
plt.legend()
plt.show()

# %% [markdown]
# ## 8. How sure is it?
# A result is as strong as its weakest input, and every assumption is listed.

# %%
print("class of the result:", result.provenance_class.value)
for assumption in result.all_assumptions[:8]:
    print(f"- {assumption.name} = {assumption.value}: {assumption.why}")
print(f"... {len(result.all_assumptions)} in all")

# %% [markdown]
# ## 9. The decision
# The smallest response time among the arms that keep 95 % of tokens as full depth gives them:

# %%
kept = {name: arm.metrics for name, arm in result.arms.items() if arm.metrics["agreement"] >= 0.95}
choice = min(kept, key=lambda name: kept[name]["e2e_s_mean"])
print(f"Serve with {choice}: {kept[choice]['e2e_s_mean']:.2f} s, {kept[choice]['agreement']:.1%} of tokens unchanged.")

# %% [markdown]
# ## 10. From here
# `python -m helios_sim +experiment=load_sweep` asks the same over eleven loads with a report and figures;
# `policy=custom policy.object=module:Name` puts your own policy beside these.
