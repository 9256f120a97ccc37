"""The gate's verdict as JUnit XML, which CI systems show: a test case per limit; failed and undecided are failures."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from safecl.evaluation.results.checks import GateResult


def junit_xml(gate: GateResult, name: str) -> str:
    """Return the document. name: of the judged folder."""
    beyond = sum(check.verdict != "passed" for check in gate.checks)
    counts = {"tests": str(len(gate.checks)), "failures": str(beyond), "errors": "0", "skipped": "0"}
    root = ElementTree.Element("testsuites", {"name": "safecl gate", **counts})
    suite = ElementTree.SubElement(root, "testsuite", {"name": _clean(name), **counts})
    for check in gate.checks:
        title = check.name if check.category is None else f"{check.name} [{check.category}]"
        case = ElementTree.SubElement(suite, "testcase", {"classname": "safety.gate", "name": _clean(title)})
        if check.verdict == "passed":
            ElementTree.SubElement(case, "system-out").text = _clean(check.message)
        else:
            failure = {"type": check.verdict, "message": _clean(check.message)}
            ElementTree.SubElement(case, "failure", failure).text = _clean(check.message)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _clean(text: str) -> str:
    """Leave out the characters that XML 1.0 cannot hold."""
    return re.sub("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "", text)
