"""pytest plugin: put this package's classes in the place of Transformers', and write the outcome of each test.

It runs in a process of its own, because the tests of Transformers are a package `tests` too.
"""

import importlib
import json
from pathlib import Path

import transformers
import transformers.models.beit

import beit_fast

MODELS = (
    "BeitPreTrainedModel",
    "BeitModel",
    "BeitForImageClassification",
    "BeitForMaskedImageModeling",
    "BeitForSemanticSegmentation",
    "BeitBackbone",
)
PROCESSORS = ("BeitImageProcessor", "BeitImageProcessorPil")


def pytest_addoption(parser):
    parser.addoption("--outcomes", type=Path, required=True, help="write {test: outcome} to this file")
    parser.addoption("--baseline", action="store_true", help="test Transformers' own classes")


def pytest_configure(config):
    if not config.getoption("--baseline"):
        replace_classes()
    config.pluginmanager.register(Outcomes(config.getoption("--outcomes")))


def replace_classes():
    """Set our classes wherever Transformers' Auto classes and tests look them up."""
    modeling, configuration = (
        importlib.import_module(f"transformers.models.beit.{name}") for name in ("modeling_beit", "configuration_beit")
    )
    public = (transformers, transformers.models.beit)
    for module in (*public, modeling):
        for name in MODELS:
            setattr(module, name, getattr(beit_fast, name))
    for module in (*public, configuration):
        module.BeitConfig = beit_fast.BeitConfig
    for module in public:
        for name in PROCESSORS:
            setattr(module, name, beit_fast.BeitImageProcessor)


class Outcomes:
    """The outcome of each test: failed if a subtest failed, `"subtests skipped"` if all subtests were skipped."""

    def __init__(self, file):
        self.file = file
        self.tests = {}
        self.subtests = {}

    def pytest_runtest_logreport(self, report):
        name = report.nodeid.partition("::")[2]
        if hasattr(report, "context"):
            self.subtests.setdefault(name, set()).add(report.outcome)
        elif report.when == "call" or report.outcome != "passed":
            worse = self.tests.get(name) == "failed"
            self.tests[name] = "failed" if worse else report.outcome

    def pytest_sessionfinish(self):
        for name, outcomes in self.subtests.items():
            if "failed" in outcomes:
                self.tests[name] = "failed"
            elif outcomes == {"skipped"} and self.tests[name] == "passed":
                self.tests[name] = "subtests skipped"
        self.file.write_text(json.dumps(self.tests))
