"""Unique names for the encoders, data sets and protocols of a report."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import textwrap
from collections.abc import Hashable, Mapping, Sequence

from xsmae.bands import BANDS
from xsmae.evaluation.rows import Protocol


def distinct_names(choices: Mapping[Hashable, Sequence[str]]) -> dict[Hashable, str]:
    """A unique name per key: its first choice if no other key has the same one.

    Keys with the same first choice get the first later choice that tells them all
    apart, or the last choice if there is none.
    """
    sharing = collections.defaultdict(list)
    for key, names in choices.items():
        sharing[names[0]].append(key)
    found = {}
    for keys in sharing.values():
        levels = list(zip(*(choices[key] for key in keys), strict=True))
        differing = [level for level in levels if len(set(level)) == len(keys)]
        found |= zip(keys, (differing or levels[-1:])[0], strict=True)
    return found


def encoder_names(encoders: Mapping[str, Mapping]) -> dict[str, str]:
    """digest -> the encoder's name, plus its folder, seed or digest if not unique."""
    choices = {}
    for digest, encoder in encoders.items():
        name, origin = encoder["name"], encoder.get("origin", {})
        seed = origin.get("random_seed")
        place = origin.get("path", "") if seed is None else f"seed {seed}"
        choices[digest] = [name, f"{name} ({place})", f"{name} ({digest[:6]})"]
    return distinct_names(choices)


def data_names(protocols: Mapping[str, Protocol]) -> dict[str, str]:
    """protocol -> the data's name, plus counts, bands or a digest if not unique."""
    keys, choices = {}, {}
    for protocol_key, protocol in protocols.items():
        data = protocol.data
        # Two names may mean one data set, and two data sets may share a name.
        key = json.dumps({k: v for k, v in data.items() if k != "name"}, sort_keys=True)
        name, keys[protocol_key] = data["name"], key
        counts = " + ".join(f"{data[part]['images']:,}" for part in ("train", "test"))
        digest = hashlib.sha256(key.encode()).hexdigest()[:6]
        bands = bands_of(protocol)
        shown = ", ".join(bands) if len(bands) < 5 else f"{len(bands)} bands"
        texts = (f"{counts} images", shown, digest)
        levels = [name, *(f"{name} ({text})" for text in texts)]
        choices.setdefault(key, levels)
    names = distinct_names(choices)
    return {protocol_key: names[key] for protocol_key, key in keys.items()}


def bands_of(protocol: Protocol) -> Sequence[str]:
    """The bands of rasters; those of 8-bit images are always the same."""
    return protocol.data.get("bands", BANDS)


def changes(protocol: Protocol) -> list[str]:
    """What the options that change features mean, one line each."""
    found, block = [], protocol.options.get("block")
    if "standardize" in protocol.options:
        found.append(
            "standardize: every dimension of a feature has mean 0 and standard "
            "deviation 1 over the training images"
        )
    if block is not None:
        found.append(
            f"block={block}: the tokens of this block, counted from 1, without the "
            "final norm; statistics and thumbnail have no blocks"
        )
    return found


def headings(protocols: Mapping[str, Protocol]) -> dict[str, str]:
    """protocol -> task and data, plus the fields that differ if not unique."""
    data = data_names(protocols)
    plain = {key: f"{p.title}, {data[key]}" for key, p in protocols.items()}
    choices = {}
    for key, protocol in protocols.items():
        others = [_facts(protocols[k]) for k in protocols if plain[k] == plain[key]]
        differing = {
            name: value
            for name, value in _facts(protocol).items()
            if any(other.get(name) != value for other in others)
        }
        text = ", ".join(f"{name}={value}" for name, value in differing.items())
        short = textwrap.shorten(f"{plain[key]}: {text}", 100, placeholder=" ...")
        choices[key] = [plain[key], short, f"{plain[key]} ({key})"]
    return distinct_names(choices)


def _facts(protocol: Protocol) -> dict[str, str]:
    facts = {f.name: getattr(protocol, f.name) for f in dataclasses.fields(protocol)}
    facts |= facts.pop("options") | facts.pop("interval")
    return {name: str(value) for name, value in facts.items() if name != "data"}
