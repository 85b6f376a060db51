"""Every mistake of a user: one message with key, value, what is allowed and the fix, status 1, nothing left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import helios_sim.study.command
from command_line import STUDY, CommandLine, write_study
from helios_sim.errors import UserError
from helios_sim.policy.registry import POLICIES
from helios_sim.profile.store import PROFILES_FOLDER
from helios_sim.provenance import Provenance
from helios_sim.workload.traces import read_trace

# (arguments, parts of the message). Each message must name the key and the value.
SETTINGS = [
    ("workload.n_request=5", ["workload.n_request='5'", "no such setting", "workload.n_requests"]),
    ("n_requests=5", ["n_requests='5'", "workload.n_requests"]),
    ("server.max_num_seqs=64", ["you may have meant server.max_running_requests"]),
    ("server.priority=true", ["you may have meant server.order"]),
    ("workload.arrivals.rate=5", ["you may have meant workload.arrivals.rate_per_s"]),
    ("server.preset=vllm-0.9", ["server.preset='vllm-0.9'", "the nearest: vllm-0.10 and vllm-0.8"]),
    ("sweep.parameters={}", ["sweep.parameters='{}'", "without any there are no designs"]),
    ("name=../x", ["name='../x'", "without /"]),
    ("seeds=0,1,2", ["seeds='0,1,2'", "write seeds=[...] for a list, or -m"]),
    ("port=8000", ["port='8000'", "python -m helios_sim.serve"]),
    ("colour=red", ["colour='red'", "no such setting", "--cfg job"]),
    ("server.replicas=abc", ["server.replicas='abc'", "a whole number"]),
    ("workload.arrivals.rate_per_s=fast", ["workload.arrivals.rate_per_s='fast'", "a number or null"]),
    ("models=opt-1.3b", ["models='opt-1.3b'", "a list such as [a,b]"]),
    ("seeds=[a]", ["seeds=['a']", "whole numbers"]),
    ("seeds=[1.5]", ["seeds=[1.5]", "whole numbers"]),
    ("seeds=[]", ["seeds=[]", "a list"]),
    ("seeds=some", ["seeds='some'", "or auto"]),
    ("auto_seeds.first=20", ["auto_seeds.first='20'", "only with seeds=auto"]),
    ("seeds=auto auto_seeds.first=1", ["auto_seeds.first=1", "from 2"]),
    ("seeds=auto auto_seeds.at_most=4", ["auto_seeds.at_most=4", "at least auto_seeds.first"]),
    ("seeds=auto auto_seeds.relative_width=0", ["auto_seeds.relative_width=0", "above 0"]),
    ("server=3", ["server='3'", "a group of settings", "max_running_requests"]),
    ("+experiment=qickstart", ["experiment='qickstart'", "quickstart", "experiment=quickstart"]),
    ("policy=helois", ["policy='helois'", *POLICIES, "policy=helios"]),
    ("workload=none_such", ["workload='none_such'", "sharegpt_like"]),
    ("objective=joy", ["objective='joy'", "energy"]),
    ("objective=[energy,quality]", ["objective='[energy,quality]'", "settings of two would be mixed"]),
    ("policy=[helios,none]", ["policy='[helios,none]'", "settings of two would be mixed"]),
    ("slo={}", ["slo='{}'", "an empty one is merged", "does nothing"]), ("arms={}", ["arms='{}'", "does nothing"]),
    ("figures=[{kind:sweep,x:rate}]", ["figures.x='rate'", "there is no sweep"]),
    ("sweeps=[{arm:[helios]}]", ["arm is none of its settings: axes, arms", "you may have meant arms"]),
    ("sweeps=[{axes:[{key:a}]}]", ["key is none of its settings: name, settings, values"]),
    ("sweeps=[{axes:[{values:3}]}]", ["values in it must be a list"]),
    ("sweeps=[{axes:[{name:a,settings:[server.block_tokens],values:[16,16]}]}]", ["={'a': 16}", "other runs"]),
    ("sweeps=[{axes:[{name:a,settings:[report.style],values:[page,paper]}]}]", ["counts for none of full_depth"]),
    ("sweeps=[{arms:[full_depth_opt-1.3b],axes:[{name:a,settings:[arms.helios.cap_layers],values:[8,9]}]}]",
     ["counts for none of full_depth_opt-1.3b"]),
    ("objective=energy objective.goal=throughput", ["objective='energy'", "objective.goal=energy"]),
    ("hardware=tpu", ["hardware='tpu'", "a card of the catalogue (a100-40gb"]),
    ("models=[gpt-5]", ["models='gpt-5'", "the path of its config.json"]),
    ("models=[]", ["models=[]", "at least one model"]),
    ("models=[opt-1.3b,opt-1.3b]", ["models=", "each model once"]),
    ("runtime.preset=magic", ["runtime.preset='magic'", "captured_graphs, eager"]),
    ("objective.goal=joy", ["objective.goal='joy'", "throughput, response_time, energy, batch_size"]),
    ("objective.max_disagreement=2", ["objective.max_disagreement=2.0", "from 0 to 1"]),
    ("server.router=magic", ["server.router='magic'", "round_robin, least_loaded"]),
    ("server.router=by_task", ["server.router='by_task'", "cluster.kinds"]),
    ("+cluster.kinds.big.count=0", ["cluster.kinds.big.count=0", "at least 1"]),
    ("+cluster.kinds.big.hardware=tpu", ["cluster.kinds.big", "hardware='tpu'"]),
    ("+cluster.kinds.big.policy=full_depth +cluster.kinds.big.model=gpt-5", ["cluster.kinds.big", "gpt-5"]),
    ("cluster.magic=1", ["cluster.magic='1'", "no such setting"]),
    ("+server.pipeline_parallel_size=2", ["pipeline parallelism is not modelled", "4xh100"]),
    ("server.enable_expert_parallel=true", ["expert parallelism is not modelled", "4xh100"]),
    ("hardware=2x(4xh100)", ["one group of cards", "set hardware=4xh100 server.replicas=2"]),
    ("+cluster.tasks.gsm8k=big", ["cluster.tasks", "server.router=by_task"]),
    ("server.block_tokens=0", ["server.block_tokens=0", "from 1 to"]),
    ("server.memory_utilisation=1.5", ["server.memory_utilisation=1.5", "at most 1"]),
    ("server.memory_utilisation=0.05", ["arms.full_depth_opt-1.3b", "server.memory_utilisation"]),
    ("exits.source=nowhere", ["exits.source='nowhere'", "published"]),
    ("exits.threshold=0.5 exits.source=none", ["exits.threshold='0.5'", "does nothing here"]),
    ("exits.confidence=mood", ["exits.confidence='mood'", "max_probability"]),
    ("exits.threshold=0.5", ["threshold", "0.5", "0.9"]),
    ("+exits.parameters.magic=1", ["exits.parameters.magic=1", "unchanged"]),
    ("+exits.parameters.unchanged=7", ["exits.parameters.unchanged=7", "Fix"]),
    ("workload.n_requests=0", ["n_requests=0", "Fix"]),
    ("workload.arrivals.rate_per_s=-1", ["workload.arrivals.rate_per_s=-1.0", "above 0"]),
    ("workload.arrivals.rate_per_s=null", ["workload.arrivals.rate_per_s=None", "needs a value"]),
    ("workload.arrivals.kind=gamma", ["workload.arrivals.cv=None", "needs a value"]),
    ("workload.arrivals.kind=rush", ["workload.arrivals.kind='rush'", "poisson"]),
    ("workload.arrivals.kind=closed_loop workload.arrivals.users=0", ["users=0", "Fix"]),
    ("workload.arrivals.kind=trace workload.arrivals.trace=none.csv", ["none.csv", "Fix"]),
    ("workload.lengths.output.minimum=-3", ["minimum=-3", "Fix"]),
    (f"workload.lengths.output.minimum={10**30}", ["minimum", "at most", "lower it"]),
    (f"workload.lengths.output={{kind:fixed,value:{10**30}}}", ["value", "at most", "lower it"]),
    ("workload.lengths.output.p50=20 workload.lengths.output.p95=1", ["workload.lengths.output.p95", "1.0", "Fix"]),
    ("workload.mix.tasks.gsm8k=-1", ["workload.mix.tasks", "-1.0", "0 or more"]),
    ("workload.mix.drift=step workload.mix.at=0.5", ["workload.mix.", "after"]),
    ("workload.mix.drift=step workload.mix.at=-1 +workload.mix.after.gsm8k=1", ["workload.mix.at=-1.0", "at least 0"]),
    ("policy=early_exit policy.model=opt-1.3b policy.threshold=0.5", ["threshold", "0.5", "0.9"]),
    ("workload.mix.drift=sudden", ["workload.mix.drift='sudden'", "step, linear, periodic"]),
    ("slo.ttft_s=-1", ["slo.ttft_s=-1", "Fix"]),
    ("slo.ttft_s=500", ["slo.ttft_s=500", "at most 90", "milliseconds"]),
    ("slo.tpot_s=50", ["slo.tpot_s=50", "at most 5"]),
    ("seeds=[1,1]", ["seeds=[1, 1]", "different"]),
    ("jobs=0", ["jobs=0", "at least 1"]),
    ("profile_time_factor=0", ["profile_time_factor=0", "above 0"]),
    ("profile_prompt_time_factor=-1", ["profile_prompt_time_factor=-1", "null or above 0"]),
    ("mode=lively", ["mode='lively'", "simulate, live"]),
    ("baseline=best", ["baseline='best'", "full_depth_opt-1.3b"]),
    ("subject=best", ["subject='best'", "full_depth_opt-1.3b"]),
    ("headline_metrics=[e2e_mean]", ["headline_metrics='e2e_mean'", "e2e_s_mean"]),
    ("policy=full_depth", ["policy.model=None", "opt-1.3b, opt-6.7b"]),
    ("policy=early_exit policy.model=gpt", ["policy.model='gpt'", "opt-1.3b, opt-6.7b"]),
    ("policy=helios policy.round_request=3", ["policy.round_request='3'", "policy.round_requests"]),
    ("policy=helios policy.limit=100", ["policy.limit=100", "below the window"]),
    ("policy=helios policy.shortlist=many", ["policy.shortlist='many'", "whole number"]),
    ("policy=helios policy.on_breach=panic", ["policy.on_breach='panic'", "load_only"]),
    ("policy=static_cap policy.model=opt-1.3b policy.cap_layers=7", ["cap_layers", "7", "6, 12, 24"]),
    ("policy.limit=3", ["policy.limit='3'", "need a policy"]),
    ("policy=helios policy=oracle", ["policy='helios and oracle'", "only the last would run", "+arms.NAME"]),
    ("objective=energy objective=quality", ["objective='energy and quality'", "only the last would run"]),
    ("workload=w1 +workload=azure_conversation", ["workload='w1 and azure_conversation'", "only the last would run"]),
    ("--experiment own", ["argument='--experiment'", "write +experiment=NAME, without dashes"]),
    ("--config-dir=a --config-dir b", ["--config-dir='a and b'", "only the last would be looked into"]),
    ("+experiment=", ["experiment=''", "the name of an experiment", "+experiment=NAME"]),
    ("exits.source=nowhere.csv", ["exits.source='nowhere.csv'", "a table that is there", "correct the path"]),
    ("pictures=2", ["pictures='2'", "true or false"]),
    ("--cfg job --package wrkload", ["--package='wrkload'", "a group of settings", "--package workload"]),
    ("--config-dir= policy=helios", ["--config-dir=''", "must be a folder"]),
    ("workload=conf/workload/azure_conversation", ["workload=", "write workload=azure_conversation, without folders"]),
    ("workload.mix.tasks.gsm8k=50%", ["workload.mix.tasks.gsm8k='50%'", "must be a number"]),
    ("slo.ttft_s=\u201c5\u201d", ["cannot be read", "write plain quotes"]),
    ("+sweep.parameters.a={settings:[server.replicas],values:[1,2]}",
     ["sweep.parameters.a=", "given whole", "'+sweep.parameters={a: {settings"]),
    ("+sweep.parameters.a.settings=[server.replicas]", ["'+sweep.parameters={a: {settings: [server.replicas], ...}}'"]),
    ("figures.kind=bars", ["figures.kind='bars'", "figures is a list", "figures.0.kind=bars"]),
    ("workload.lengths.prompt={kind:fixed,value:ten}", ["value in it must be a whole number", "correct value"]),
    ("workload[n_requests]=12", ["cannot be read", "points between names: workload.n_requests=VALUE"]),
    ("workload.n_requests==12", ["cannot be read", "write key=value, with one ="]),
    ("+++seeds=[0]", ["cannot be read", "++ before one that may be there"]),
    ("policy=helios,oracle", ["policy='helios,oracle'", "choose one, or begin with -m"]),
    ("workload.prefixes.share=2", ["workload.prefixes.share='2'", "no such setting", "workload has statement"]),
    ("=5", ["argument='=5'", "this has no key"]),
    ("models=[opt-1.3b,]", ["models=[opt-1.3b,]", "leave out the last comma"]),
    ("workload.n_requests=1\u0662", ["cannot be read", "write the digit \u0662 as 2"]),
    ("workload..n_requests=5", ["cannot be read", "write one point between names"]),
    ("~workload.arrivals.rate_per_s", ["workload.arrivals.rate_per_s='~'", "a setting that stays", "another value"]),
    ("hydra.sweeper.params.seeds=1", ["hydra.sweeper.params.seeds='1'", "no such setting of Hydra"]),
    ("-m workload.arrivals.rate_per_s=interval(1,5)", ["interval(1,5)", "values one by one", "range(1,4)"]),
    ("policy=null", ["policy='null'", "every study has one", "policy=none"]),
    ("engine=vllm-0.19", ["engine='vllm-0.19'", "write server.preset=vllm-0.19"]),
    ("+policy=helios", ["policy='+policy=helios'", "write policy=helios alone"]),
    ("server.preset=vllm-0.19 server.preset=vllm-0.24", ["server.preset='server.preset=vllm-0.19", "0.24 alone"]),
    ("+policy.limit=3", ["policy.limit='3'", "need a policy"]),
    ("policy=custom", ["policy.object=None", "set policy.object"]),
    ("policy=custom policy.path=mine.P", ["policy.path='mine.P'", "custom knows object, settings"]),
    ("policy=custom policy.settings.patience=5", ["policy.settings.patience='5'", "'+policy.settings.patience=5'"]),
    ("policy=custom policy.object=nowhere:Policy", ["policy.object='nowhere:Policy'", "no module nowhere"]),
    ("policy=custom policy.object=mine.py:P", ["policy.object='mine.py:P'", "name the module, not its file: mine:P"]),
    ("policy=custom policy.object=json", ["policy.object='json'", "module:Name"]),
    ("policy=custom policy.object=json:Nothing", ["policy.object='json:Nothing'", "a module of Python's own"]),
    ("policy=custom policy.object=json:JSONEncoder", ["json:JSONEncoder", "start(situation)"]),
    ("arms.mine.policy=helios", ["arms.mine.policy='helios'", "'+arms.mine.policy=helios'"]),
    ("+arms.mine=3", ["arms.mine=3", "a mapping"]),
    ("models=${seeds}", ["models=[0]", "each a text"]),
    ("workload.mix.tasks=${slo}", ["workload.mix.tasks.ttft_s=None", "a number"]),
    ("models=[[a]]", ["models=", "each a text"]),
    ("+arms.m={policy:full_depth,overrides:{seeds:[3]}}", ["arms.m.overrides.seeds=[3]", "the same requests"]),
    ("+arms.m={policy:full_depth,overrides:{server.replicas:0}}", ["arms.m: server.replicas=0: must be from 1"]),
    ("+arms.m={policy:full_depth,overrides:{server.router:prefix_aware,server.replicas:2}}",
     ["arms.m: server.router='prefix_aware'", "server.enable_prefix_caching=true"]),
    ("+arms.m={policy:full_depth,overrides:{jobs:3}}", ["arms.m.overrides.jobs=3", "of the whole study"]),
    ("+arms.mine.model=opt-1.3b", ["arms.mine=", "names its policy"]),
    ("+arms.mine.policy=magic", ["arms.mine: policy='magic'", "helios"]),
    ("hydra.colour=red", ["hydra.colour='red'", "--cfg hydra"]),
    ("name=${title_of}", ["name='${title_of}'", "no such setting"]),
    ("arms.full_depth_opt-1.3b.round_requests=5",
     ["arms.full_depth_opt-1.3b.round_requests=5", "full_depth knows description, baseline, overrides, sweeps_only"]),
    ("arms.helios.round_request=5", ["helios knows", "you may have meant round_requests"]),
    ("arms.helios.round_requests=5", ["'+arms.helios.round_requests=5'"]),
    ("+experiment=capacity capacity.cards=[]", ["capacity.cards='[]'", "such as [l40s", "name some"]),
    ("a==b", ["argument='a==b'", "key=value"]),
    ("quickstart", ["argument='quickstart'", "key=value"]),
    ("--fast", ["--fast", "--help"]),
    ("--cfg", ["--cfg", "expected one argument"]),
    ("--config-dir nowhere", ["--config-dir='nowhere'", "a folder"]),
    ("--config-name other", ["--config-name='other'", "+experiment=NAME"]),
    ("+experiment=own +experiment=drift", ["one", "-m +experiment=a,b"]),
    ("+experiment=conf/experiment/mine.yaml", ["experiment='conf/experiment/mine.yaml'", "Fix"]),
    ("--cfg job -m", ["--cfg job -m", "Only one of"]),
    ("~jobs", ["jobs", "Fix"]),
]  # fmt: skip

EXPERIMENTS = {
    "arms without a policy": (STUDY.replace("{policy: early_exit}", "{model: opt-1.3b}"), ["arms.early_exit"]),
    "unknown setting": (STUDY + "servers: {replicas: 2}\n", ["experiment/mine: servers", "no such setting", "server"]),
    "wrong type": (STUDY + "seeds: many\n", ["seeds", "a list"]),
    "no YAML": (STUDY + "seeds: [1\n", ["YAML", "Fix"]),
    "labels that do not match": (
        STUDY + "sweeps: [{axes: [{name: batch, settings: [server.replicas], values: [1, 2], labels: [a]}]}]\n",
        ["sweeps.axes.batch.labels=['a']", "2 labels"],
    ),
    "an axis without values": (
        STUDY + "sweeps: [{axes: [{name: b, settings: [jobs]}]}]\n",
        ["sweeps.axes.b=None", "needs values"],
    ),
    "a sweep over what does not exist": (
        STUDY + "sweeps: [{axes: [{name: b, settings: [server.batch], values: [1]}]}]\n",
        ["server.batch", "no such setting"],
    ),
    "a sweep over seeds": (
        STUDY + "sweeps: [{axes: [{name: s, settings: [seeds], values: [[0], [1]]}]}]\n",
        ["sweeps.axes.s.settings='seeds'", "the same for all"],
    ),
    "a sweep with a wrong value": (
        STUDY + "sweeps: [{axes: [{name: b, settings: [server.replicas], values: [1, two]}]}]\n",
        ["server.replicas='two'", "a whole number"],
    ),
    "a sweep of an unknown arm": (
        STUDY + "sweeps: [{arms: [best], axes: [{name: b, settings: [jobs], values: [1]}]}]\n",
        ["sweeps.arms='best'"],
    ),
    "a gate on an unknown metric": (
        STUDY + "gates: [{arm: early_exit, metric: speed, low: 1}]\n",
        ["gates.metric='speed'"],
    ),
    "a gate without a bound": (
        STUDY + "gates: [{arm: early_exit, metric: batch_mean}]\n",
        ["gates='batch_mean'", "a bound"],
    ),
    "a published figure of an unknown arm": (STUDY + "published: [{arm: best}]\n", ["published.arm='best'"]),
    "a figure over no sweep": (STUDY + "figures: [{x: rate}]\n", ["figures.x='rate'", "there is no sweep"]),
    "an override that does not exist": (
        STUDY.replace("{policy: early_exit}", "{policy: early_exit, overrides: {server.batch: 3}}"),
        ["server.batch", "no such setting"],
    ),
    "no package": (STUDY.partition("\n")[2], ["experiment/mine.yaml=", "# @package _global_ in its first line"]),
    "a byte order mark": ("\ufeff" + STUDY, ["without a byte order mark"]),
    "a group of the program among its defaults": (
        STUDY.replace("\n", "\ndefaults:\n  - workload: azure_conversation\n", 1),
        ["defaults='workload: azure_conversation'", "override /workload: azure_conversation"],
    ),
    "a second choice": (
        STUDY.replace("\n", "\ndefaults:\n  - /workload: azure_conversation\n", 1), ["override /workload: azure_conv"],
    ),
    "a list of arms": (STUDY + "cost: [{gco2e_per_kwh: 3}]\n", ["experiment/mine: cost=", "a group of settings"]),
    "a list alone": ("# @package _global_\n- a\n", ["mine.yaml=['a']", "KEY: VALUE"]),
    "a name that is a number": (STUDY + "cluster: {tasks: {1: a}}\n", ["cluster.tasks=1", 'in quotes: "1"']),
    "a number that is none": (STUDY + "jobs: 1.5\n", ["experiment/mine: jobs=1.5", "whole number"]),
    "a setting of one of several gates": (
        STUDY + "gates: [{arm: early_exit, metric: batch_mean, high: 5 s}]\n", ["gates.0.high='5 s'", "a number"],
    ),
    "a setting of one of several axes": (
        STUDY + "sweeps: [{axes: [{name: b, settings: jobs, values: [1]}]}]\n",
        ["sweeps.0.axes.0.settings='jobs'", "a list"],
    ),
    "a group of files as a text": (STUDY + "policy: helios\n", ["policy='helios'", "override /policy: helios among"]),
    "the name of the command line": (
        STUDY.replace("models: [opt-1.3b]", "model: opt-1.3b"), ["model='opt-1.3b'", "you may have meant models;"],
    ),
    "a setting of no axis": (STUDY + "sweeps: [{axes: [{start: 1}]}]\n", ["axes.0 has name, settings"]),
    "a setting that a group does not have": (
        STUDY.replace("p95: 30", "std: 3"), ["workload.lengths.output has kind, value, mean, sigma"],
    ),
    "overrides in a list": (
        STUDY.replace("{policy: early_exit}", "{policy: early_exit, overrides: [jobs=4]}"), ["overrides=['jobs=4']"],
    ),
    "a sweep of nothing": (STUDY + "sweeps: [{arms: [early_exit]}]\n", ["sweeps.axes=[]", "nothing varies"]),
    "a preset in a file": (STUDY + "server: {preset: vllm-0.19}\n", ["write - /engine: vllm-0.19"]),
    "what counts for other arrivals": (
        STUDY.replace("n_requests: 12", "arrivals: {users: 4}"),
        ["mine.yaml: workload.arrivals.users=4", "does nothing here", "closed_loop"],
    ),
    "a gate that nothing passes": (
        STUDY + "gates: [{arm: early_exit, metric: ttft_s_p50, low: 2.0, high: 1.0}]\n", ["gates.low=2.0", "exchange"],
    ),
    "a published row without a figure": (STUDY + "published: [{arm: early_exit}]\n", ["published.published", "1.48"]),
    "a mix that is joined with the workload's": (
        STUDY.replace("n_requests: 12", "mix: {tasks: {gsm8k: 1.0}}"),
        ["mine.yaml: workload.mix.tasks=", "sharegpt: 0.2, cnn_dailymail: 0.2", "with 0 for a task to be left out"],
    ),
    "an arm's override that does nothing": (
        STUDY.replace("{policy: early_exit}", "{policy: early_exit, overrides: {workload.arrivals.cv: 2.0}}"),
        ["mine.yaml: arms.early_exit.overrides.workload.arrivals.cv=2.0", "does nothing here"],
    ),
    "exits that there are none of": (
        STUDY + "exits: {source: none, parameters: {task_spread: 0.5}}\n", ["mine.yaml: exits.parameters", "nothing"],
    ),
    "a plan of no cards": (STUDY + "capacity: {by: p95}\n", ["mine.yaml: capacity", "does nothing", "capacity.cards"]),
    "a search of nothing": (STUDY + "sweep: {method: search}\n", ["mine.yaml: sweep", "only with sweep.parameters"]),
    "the host's part of no split": (STUDY + "runtime: {regroup_s: 0.001}\n", ["runtime.regroup_s=0.001", "rebatch"]),
    "an evaluation that never is": (
        STUDY.replace("{policy: early_exit}", "{policy: helios, evaluation: 'off', prompts_per_candidate: 3}"),
        ["mine.yaml: arms.early_exit.prompts_per_candidate=3", "does nothing"],
    ),
    "an axis that does nothing": (
        STUDY + "sweeps: [{axes: [{name: a, settings: [workload.arrivals.cv], values: [0.5, 2.0]}]}]\n",
        ["mine.yaml: workload.arrivals.cv='an axis'", "gamma"],
    ),
    "two axes of one name": (
        STUDY + "sweeps: [{axes: [{name: a, settings: [server.block_tokens], values: [8, 16]}, "
        "{name: a, settings: [server.max_running_requests], values: [8, 16]}]}]\n", ["sweeps.axes.name='a'"],
    ),
    "labels that are alike": (
        STUDY + "sweeps: [{axes: [{name: a, settings: [server.block_tokens], values: [8, 16], labels: [x, x]}]}]\n",
        ["sweeps.axes.a.labels", "different labels"],
    ),
    "a design of another arm": (
        STUDY + "sweep: {arm: early_exit, "
        "parameters: {a: {settings: [arms.full_depth.batch_limit], values: [2]}}}\n",
        ["sweep.parameters.a.settings=['arms.full_depth.batch_limit']", "change nothing of early_exit"],
    ),
    "a promise about no exits": (
        STUDY + "exits: {source: none, guarantee: {max_disagreement: 0.1}, threshold: null}\n",
        ["exits.guarantee.max_disagreement=0.1", "only with exits"],
    ),
    "an engine that is not known": (
        STUDY.replace("name:", "defaults:\n  - /engine: vllm-0.9\nname:"), ["vllm-0.9", "one of", "vllm-0.10"],
    ),
    "an axis of no setting": (
        STUDY + "sweeps: [{axes: [{name: a, settings: [server.max_runing_requests], values: [8, 16]}]}]\n",
        ["server.max_runing_requests=8", "you may have meant server.max_running_requests"],
    ),
    "a package after other words": ("# mine\n" + STUDY, ["# @package _global_ in its first line", "'# mine'"]),
    "defaults in one word": (STUDY.replace("name:", "defaults: quickstart\nname:"), ["='quickstart'", "a list"]),
    "a group below the file": (
        STUDY.replace("name:", "defaults:\n  - override objective: energy\nname:"),
        ["write override /objective: energy"],
    ),
    "a group without a colon": (
        STUDY.replace("name:", "defaults:\n  - override /objective energy\nname:"),
        ["write override /objective: energy"],
    ),
    "two files of a group": (
        STUDY.replace("name:", "defaults:\n  - override /policy: helios\n  - override /policy: oracle\nname:"),
        ["override /policy", "oracle", "policy once"],
    ),
    "a list of files": (
        STUDY.replace("name:", "defaults:\n  - override /policy: [helios, oracle]\nname:"), ["one file of a group"],
    ),
    "an engine in place of none": (
        STUDY.replace("name:", "defaults:\n  - override /engine: vllm-0.19\nname:"), ["write /engine: vllm-0.19"],
    ),
    "settings among the defaults": (
        STUDY.replace("name:", "defaults:\n  - override /server: x\nname:"), ["a group to choose from", "below"],
    ),
    "a file of itself": (STUDY.replace("name:", "defaults:\n  - mine\nname:"), ["other files than this one"]),
    "a kind of lengths that is not known": (
        STUDY.replace("p50: 12, p95: 30", "kind: normal, mean: 12"), ["lengths.output.kind='normal'", "one of fixed"],
    ),
    "an autoscaler that is not on": (
        STUDY + "autoscale: {start_s: 5}\nserver: {replicas: 2}\n", ["autoscale.start_s=5", "with autoscale.least"],
    ),
    "a drift that never comes": (
        STUDY.replace("n_requests: 12", "mix: {after: {gsm8k: 1}, drift: step, at: 50}"), ["mix.at=50.0", "never"],
    ),
    "a number in place of a list": (
        STUDY.replace("n_requests: 12", "faults: {load_fails: {at_s: 1.0}}"), ["load_fails.at_s=1.0", "a list"],
    ),
    "a figure of no point": (
        STUDY + "sweeps: [{axes: [{name: b, settings: [server.block_tokens], values: [8, 16]}]}]\n"
        "figures: [{x: b, where: {b: 7}}]\n", ["figures.where.b=7", "[8, 16]"],
    ),
    "a number of eight digits": (STUDY + "jobs: 012\n", ["jobs='012'", "YAML takes 010 for 8"]),
    "a number of a clock": (STUDY + "jobs: 1:30\n", ["jobs='1:30'", "1:30 for 90"]),
    "exits that were not published": (
        STUDY.replace("models: [opt-1.3b]", "models: [llama-2-7b]"),
        ["llama-2-7b", "opt-1.3b, opt-6.7b", "exits.source"],
    ),
    "a model that does not fit": (
        STUDY.replace("models: [opt-1.3b]", "models: [llama-2-13b]")
        .replace("early_exit: {policy: early_exit}", "other: {policy: full_depth}")
        + "server: {memory_utilisation: 0.3}\nexits: {source: none}\n",
        ["arms.full_depth", "llama-2-13b", "server.memory_utilisation"],
    ),
}  # fmt: skip


@pytest.fixture
def helios(capsys, monkeypatch, tmp_path) -> CommandLine:
    def never(*_: object) -> None:
        raise AssertionError("a job ran")

    monkeypatch.setattr(helios_sim.study.command, "run_jobs", never)
    return CommandLine(capsys, monkeypatch, tmp_path)


def refused(said, folder: Path, parts: list[str], kept: set[str] = frozenset()) -> None:
    assert said.status == 1, said
    assert said.out == ""
    assert len(said.err.splitlines()) == 1, said.err
    assert said.err.startswith("helios_sim: ")
    assert "Fix: " in said.err
    for part in parts:
        assert part in said.err
    assert {path.name for path in folder.iterdir()} == set(kept)


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "parts"), SETTINGS, ids=[arguments for arguments, _ in SETTINGS])
def test_a_wrong_setting(helios, tmp_path, arguments, parts):
    refused(helios(*arguments.split()), tmp_path, parts)


@pytest.mark.slow
@pytest.mark.parametrize(("text", "parts"), EXPERIMENTS.values(), ids=EXPERIMENTS)
def test_a_wrong_experiment(helios, tmp_path, text, parts):
    refused(helios(*write_study(tmp_path, text)), tmp_path, parts, kept={"conf"})


@pytest.mark.slow
def test_a_damaged_trace_of_requests(helios, tmp_path):
    (tmp_path / "requests.csv").write_text("arrived,prompt\n1,two\n")
    said = helios("workload.arrivals.kind=trace", "workload.arrivals.trace=requests.csv")
    refused(said, tmp_path, ["requests.csv"], kept={"requests.csv"})


def test_a_damaged_exit_trace(helios, tmp_path):
    (tmp_path / "exits").mkdir()
    (tmp_path / "exits" / "trace.json").write_text('{"format": "exit-trace"')
    (tmp_path / "exits" / "tokens.parquet").write_bytes(b"PAR1")
    refused(helios("exits.source=exits"), tmp_path, ["exits/trace.json", "JSON object"], kept={"exits"})


def test_a_damaged_profile(helios, tmp_path):
    folder = tmp_path / "profiles" / "opt-1.3b@a100-40gb"
    folder.mkdir(parents=True)
    for file in (PROFILES_FOLDER / folder.name).iterdir():
        (folder / file.name).write_bytes(file.read_bytes()[:200])
    said = helios("profile_folder=profiles", "models=[opt-1.3b]")
    refused(said, tmp_path, ["profiles/opt-1.3b@a100-40gb"], kept={"profiles"})


def test_an_output_folder_that_cannot_be(helios, tmp_path):
    (tmp_path / "file").write_text("in the way")
    refused(helios(into="file/out"), tmp_path, ["hydra.run.dir='file/out'", "cannot be made"], kept={"file"})


def test_a_folder_that_holds_something_is_left_alone(helios, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    refused(helios("hardware=tpu"), tmp_path, ["tpu"], kept={"out"})
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


@pytest.mark.slow
def test_several_studies_each_say_which_one_was_wrong(helios, tmp_path):
    said = helios("-m", "hardware=tpu,abacus")
    assert said.status == 1
    messages = [line for line in said.err.splitlines() if line.startswith("helios_sim: ")]
    assert len(messages) == 2
    assert "hardware=tpu" in messages[0]
    assert "hardware=abacus" in messages[1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_defect_of_ours_is_no_message_but_a_traceback(helios):
    with pytest.raises(AssertionError, match="a job ran"):
        helios()


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("workload.n_request=5",), ("--fast",), ("hardware=tpu",)])
def test_the_program_itself_ends_with_one_line_and_status_1(tmp_path, arguments):
    environment = os.environ | {"PYTHONPATH": str(Path(helios_sim.__file__).parents[1])}
    ran = subprocess.run(
        [sys.executable, "-m", "helios_sim", *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (ran.returncode, ran.stdout, len(ran.stderr.splitlines())) == (1, "", 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cell", ["٣", "1_000", "１"])
def test_numbers_that_python_alone_reads_are_named_with_their_line(cell: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(f"arrived_at,prompt_tokens,output_tokens\n0,5,5\n1,{cell},5\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"t\.csv, line 3, column prompt_tokens"):
        read_trace(tmp_path / "t.csv")


def test_a_quote_that_nothing_closes_ends_no_trace(tmp_path: Path) -> None:
    """All rows after it would be one cell."""
    rows = ["arrival_s,prompt_tokens,output_tokens,text", '0,5,5,"a', "1,6,6,c", "2,7,7,d"]
    (tmp_path / "t.csv").write_text("\n".join(rows) + "\n")
    with pytest.raises(UserError, match=r"t\.csv, line 2='a quote that nothing closes, to line 4': quotes in pairs"):
        read_trace(tmp_path / "t.csv")
    rows[2:] = ['b"', '1,6,6,"he said ""x"""', '2,7,7,5"']  # an inch closes nothing
    (tmp_path / "t.csv").write_text("\n".join(rows) + "\n")
    found = read_trace(tmp_path / "t.csv")
    assert found.prompt_tokens.tolist() == [5, 6, 7]
    assert "t.csv: 1 lines go on within quotes: 3 rows are read" in found.notices


def test_days_alone_are_no_arrivals(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("timestamp,prompt_tokens,output_tokens\n2024-10-27,5,5\n2024-10-28,5,5\n")
    with pytest.raises(UserError, match="days alone"):
        read_trace(tmp_path / "t.csv")


def test_requests_without_an_answer_are_left_out_and_counted(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("Timestamp,Request tokens,Response tokens\n0,9,0\n2,5,6\n3,7,0\n4,8,1\n")
    found = read_trace(tmp_path / "t.csv")
    assert found.arrival_ns is not None
    assert found.arrival_ns.tolist() == [0, 2_000_000_000]
    assert (found.prompt_tokens.tolist(), found.output_tokens.tolist()) == ([5, 8], [6, 1])
    assert "t.csv: 2 of 4 requests got an answer of 0 tokens and are left out" in found.notices
    assert len(read_trace(tmp_path / "t.csv", limit=1)) == 1


def test_their_texts_go_with_them(tmp_path: Path) -> None:
    rows = [{"timestamp": 1000 * k, "input_length": 20, "output_length": k % 2, "hash_ids": [k, 7]} for k in range(4)]
    (tmp_path / "t.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    found = read_trace(tmp_path / "t.jsonl", time_unit="ms", texts=True)
    assert found.texts is not None
    assert len(found) == len(found.texts.starts) - 1 == 2
    assert found.texts.ids.tolist() == [0, 2, 1, 2]  # of 1, 7, 3, 7


def test_a_trace_without_any_answer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("Timestamp,Request tokens,Response tokens\n0,5,0\n1,7,0\n")
    with pytest.raises(UserError, match=r"line 2, column Response tokens.*some request got an answer"):
        read_trace(tmp_path / "t.csv")


def test_a_provenance_with_unknown_keys_is_refused() -> None:
    known = {"provenance_class": "derived", "source": "a", "command": "b"}
    assert Provenance.from_json(known).source == "a"
    with pytest.raises(ValueError, match="no 'assumption'"):
        Provenance.from_json({**known, "assumption": []})
