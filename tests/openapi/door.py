"""Holds the HTTP door of a running relay to its OpenAPI document, and the document to the door.

<URL of a relay> [<a write key, of a relay that wants one>] [--document <a file, for the one that is served>]

Prints what was done as one line of JSON, or what is wrong, and then ends with 1.
"""

import argparse
import base64
import contextlib
import copy
import gzip
import io
import json
import sys
import tempfile
import time
from pathlib import Path

import jsonschema_rs
import requests
import schemathesis
from schemathesis.cli import schemathesis as command_line
from schemathesis.specs.openapi.definitions import OPENAPI_31_VALIDATOR

PATIENCE = 10
ORIGIN = {"Origin": "https://shop.example"}
# Of the types that a body can have beside JSON.
TEXTS = ("text/plain", "application/octet-stream")
TIMES = ("timestamp", "originalTimestamp", "sentAt")
BODY_BYTES_MAX = 1024 * 1024
EXACT_INTEGER_MAX = 2**53
# Not `ignored_auth`: its probes are sent past `before_call`, and so what says gzip is none; `check_keys`
# asks the same. Not `missing_required_header`: there is none. The others are of things that are made
# and deleted, which events are not.
CHECKS = [
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "positive_data_acceptance",
    "negative_data_rejection",
    "unsupported_method",
    "allow_header_conformance",
]
CONFIG = """
seed = 20261126
color = false
workers = 1
continue-on-failure = true
request-timeout = 10
cache.enabled = false

[generation]
deterministic = true
no-shrink = true
max-examples = 15
# A limit is bytes, and JSON Schema counts characters: the same in ASCII.
codec = "ascii"
# What HTTP has beside what a document names is no fault.
allow-extra-parameters = false

[phases]
examples.enabled = false
stateful.enabled = false

[checks]
enabled = false
{checks}
"""


class Wrong(Exception):
    """The document and the door differ."""


def want(is_so, what):
    if not is_so:
        raise Wrong(what)


# The document


def resolved(document, value):
    """What a reference stands for; of anything else that."""
    while isinstance(value, dict) and "$ref" in value:
        names = [name.replace("~1", "/").replace("~0", "~") for name in value["$ref"].split("/")[1:]]
        value = document
        for name in names:
            want(isinstance(value, dict) and name in value, f"a reference to nothing: {'/'.join(names)}")
            value = value[name]
    return value


def each_object(value):
    """Every object in it, itself among them."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from each_object(inner)


def operations(document):
    for path, item in document["paths"].items():
        for method, operation in item.items():
            yield path, method, operation


def check_document(document):
    errors = [f"{error.instance_path}: {error.message}" for error in OPENAPI_31_VALIDATOR.iter_errors(document)]
    want(not errors, "no OpenAPI 3.1: " + "; ".join(errors[:3]))
    used = set()
    for place in each_object(document):
        if isinstance(place.get("$ref"), str):
            resolved(document, place)
            used.add(place["$ref"])
    ids = [operation["operationId"] for _, _, operation in operations(document)]
    want(len(ids) == len(set(ids)), "an operationId stands twice")
    # These no operation can name.
    used |= {f"#/components/responses/{name}" for name in ["NotFound", "MethodNotAllowed", "Preflight"]}
    for kind, parts in document["components"].items():
        for name in parts if kind != "securitySchemes" else ():
            want(f"#/components/{kind}/{name}" in used, f"nothing uses {kind}/{name}")


def validator(document, of):
    """Of a schema in the document, whose references lead to others there."""
    schema = {**of, "components": document["components"]}
    return jsonschema_rs.Draft202012Validator(schema, validate_formats=True)


def closed(document):
    """The document, whose answers have no field that it does not name: a caller may get more from a
    newer relay, but from this one that is a field which nobody wrote down."""
    document = copy.deepcopy(document)
    open_ends, seen = [document["components"]["responses"]], set()
    while open_ends:
        for place in each_object(open_ends.pop()):
            name = place.get("$ref")
            if isinstance(name, str) and name not in seen:
                seen.add(name)
                open_ends.append(resolved(document, place))
            # The document itself is not described in itself.
            if "properties" in place and place.get("type") == "object":
                place.setdefault("additionalProperties", False)
    return document


# Single calls


def basic(key):
    return {"Authorization": "Basic " + base64.b64encode(f"{key}:".encode()).decode()} if key else {}


def check_answer(document, answer, response, where):
    """Its headers, its content type and its body are those of a response of the document."""
    response = resolved(document, response)
    for name, header in response.get("headers", {}).items():
        header = resolved(document, header)
        value = answer.headers.get(name)
        want(value is not None or not header.get("required"), f"{where}: no header {name}")
        if value is not None:
            is_number = header["schema"].get("type") == "integer"
            value = int(value) if is_number else value
            want(validator(document, header["schema"]).is_valid(value), f"{where}: {name}: {value}")
    content = response.get("content", {})
    if not content:
        return want(not answer.content, f"{where}: a body that is none of the document's: {answer.text[:200]}")
    media = answer.headers.get("Content-Type", "").split(";")[0]
    want(media in content, f"{where}: content type {media!r}")
    if "schema" in content[media]:
        body = answer.json() if media == "application/json" else answer.text
        errors = list(validator(document, content[media]["schema"]).iter_errors(body))
        want(not errors, f"{where}: {answer.text[:200]}: {errors[:1]}")


def check_page(answer, where):
    """A page can read it."""
    headers = answer.headers
    is_read = headers.get("Access-Control-Allow-Origin") == ORIGIN["Origin"]
    is_read &= headers.get("Access-Control-Allow-Credentials") == "true"
    want(is_read and "origin" in headers.get("Vary", ""), f"{where}: no page can read the answer")


def is_report(operation):
    """What it says is of the store, and for no page."""
    return "Reports" in operation["tags"]


def check_no_page(answer, where):
    """No page can read it."""
    names = [name for name in answer.headers if name.lower().startswith("access-control")]
    want(not names, f"{where}: a page may read the answer: {names}")


def filled(document, path, operation):
    """The path, query and headers of an operation, by the examples of its parameters."""
    given = {"query": {}, "header": {}}
    for parameter in operation.get("parameters", []):
        parameter = resolved(document, parameter)
        name, example = parameter["name"], parameter.get("example")
        if parameter["in"] == "path":
            path = path.replace(f"{{{name}}}", example)
        elif example is not None:
            given[parameter["in"]][name] = str(example)
    return path, given["query"], given["header"]


def bodies(document, operation):
    """Every example of an operation as each of its content types, plain and compressed; or nothing,
    where it takes nothing."""
    if "requestBody" not in operation:
        yield "no body", {}, None
        return
    content = resolved(document, operation["requestBody"])["content"]
    json_content = content["application/json"]
    for name, example in json_content["examples"].items():
        value = resolved(document, example)["value"]
        errors = list(validator(document, json_content["schema"]).iter_errors(value))
        want(not errors, f"the example {name} is not what its schema says: {errors[:1]}")
        body = json.dumps(value).encode()
        for media in content:
            yield f"{name} as {media}", {"Content-Type": media}, body
        yield f"{name} in gzip", {"Content-Type": "application/json", "Content-Encoding": "gzip"}, gzip.compress(body)


def check_examples(document, url, key):
    """Each of them is taken, and answered as the document says. Returns how many."""
    count = 0
    for path, method, operation in operations(document):
        path, query, stated = filled(document, path, operation)
        for name, headers, body in bodies(document, operation):
            headers = {**stated, **headers, **ORIGIN, **basic(key)}
            where = f"{method} {path}, {name}"
            answer = requests.request(method, url + path, params=query, headers=headers, data=body, timeout=PATIENCE)
            want(answer.ok, f"{where}: {answer.status_code} {answer.text[:200]}")
            want(str(answer.status_code) in operation["responses"], f"{where}: {answer.status_code} is not documented")
            check_answer(document, answer, operation["responses"][str(answer.status_code)], where)
            (check_no_page if is_report(operation) else check_page)(answer, where)
            count += 1
    return count


def check_what_is_no_operation(document, url):
    """What the document says of every path at once."""
    responses = document["components"]["responses"]
    for path, method, operation in operations(document):
        path, query, _ = filled(document, path, operation)
        asked = [("DELETE", path, "MethodNotAllowed", 405), ("OPTIONS", path, "Preflight", 204)]
        # Any path below that of an image is one.
        if "/pixel/" not in path:
            asked.append((method, f"{path}/nothing", "NotFound", 404))
        for another, there, name, status in asked:
            answer = requests.request(another, url + there, headers=ORIGIN, timeout=PATIENCE)
            want(answer.status_code == status, f"{another} {there}: {answer.status_code}, want {status}")
            if is_report(operation) and there == path:
                want("GET" in answer.headers.get("Allow", ""), f"{another} {there}: no Allow")
                check_no_page(answer, f"{another} {there}")
                continue
            check_answer(document, answer, responses[name], f"{another} {there}")
            check_page(answer, f"{another} {there}")
        if method == "get":
            answers = [requests.request(as_, url + path, params=query, timeout=PATIENCE) for as_ in ("GET", "HEAD")]
            want(len({answer.status_code for answer in answers}) == 1 and not answers[1].content, f"HEAD {path}")
        slash = requests.request(method, f"{url}{path}/", params=query, timeout=PATIENCE)
        want(slash.status_code not in (404, 405), f"{path}/: {slash.status_code}")


def check_refused(document, url, key):
    """What no event can be is refused in the words of each form. Returns how many were."""
    count = 0
    for path, method, operation in operations(document):
        # What nobody looks at is not looked at.
        if method != "post" or "401" not in operation["responses"]:
            continue
        # Of a form without it, too large is as bad as anything.
        too_large = "413" if "413" in operation["responses"] else "400"
        for media, body, status in [
            ("text/xml", b"{}", "415"),
            ("application/json", b"[", "400"),
            ("application/json", b" " * (BODY_BYTES_MAX + 1), too_large),
        ]:
            headers = {"Content-Type": media, **ORIGIN, **basic(key)}
            answer = requests.post(url + path, headers=headers, data=body, timeout=PATIENCE)
            where = f"{path}, {len(body)} bytes of {media}"
            want(str(answer.status_code) == status, f"{where}: {answer.status_code}, want {status}")
            check_answer(document, answer, operation["responses"][status], where)
            check_page(answer, where)
            count += 1
    return count


def check_keys(document, url, key):
    """What is protected is not answered without a key, and is wherever the key stands. Returns how many are."""
    heads = [basic(key), {"Authorization": f"Bearer {key}"}, {"x-api-key": key}]
    protected = [it for it in operations(document) if "401" in it[2]["responses"] and not is_report(it[2])]
    for path, method, operation in protected:
        # Of settings the key stands there and nowhere else.
        there = url + path.replace("{writeKey}", "another")
        _, headers, body = next(bodies(document, operation))
        answer = requests.request(method, there, headers=headers, data=body, timeout=PATIENCE)
        want(answer.status_code == 401, f"{path} without a key: {answer.status_code}")
        check_answer(document, answer, operation["responses"]["401"], f"{path} without a key")
        if method == "post":
            calls = [{"headers": {**headers, **head}} for head in heads]
            calls += [{"headers": headers, "params": {"writeKey": key}}]
            statuses = [requests.post(there, data=body, timeout=PATIENCE, **call).status_code for call in calls]
            want(max(statuses) < 300, f"{path} with a key: {statuses}")
    return len(protected)


# Calls that are made up


def for_fuzzing(document):
    """The document in words that schemathesis takes."""
    document = closed(document)
    for place, body in enumerate(document["components"]["requestBodies"].values()):
        # As text it is the same JSON, and read by the same code: one more type each is enough. Of a form
        # it would make fields, of which each is a text.
        media = TEXTS[place % len(TEXTS)]
        schema = body["content"]["application/json"]["schema"]
        body["content"] = {media: {"schema": schema} for media in ["application/json", media]}
    # A path that takes and answers the same as another is an alias of it.
    known = []
    for path, _, operation in list(operations(document)):
        # Which of its parameters fit each other no schema can say: tests/relay/query.rs does.
        if is_report(operation):
            del document["paths"][path]
            continue
        same = [operation.get(name) for name in ("parameters", "requestBody", "responses")]
        if same[1] and same in known:
            del document["paths"][path]
        known.append(same)
    return document


schemathesis.serializer.alias(list(TEXTS), "application/json")


def compressed(request):
    """As a client does that says so."""
    body = request.body or b""
    request.body = gzip.compress(body.encode() if isinstance(body, str) else body)
    request.prepare_content_length(request.body)
    return request


def mend(value):
    """Makes true of a body what JSON Schema cannot say: it knows no clock and not which version holds,
    not how a number is spelled, and not that two values differ."""
    for place in each_object(value):
        for name, inner in place.items():
            is_number = isinstance(inner, (int, float)) and not isinstance(inner, bool)
            if name in TIMES and (is_number or isinstance(inner, str)):
                place[name] = int(time.time())
            elif name == "schemaVersion" and inner:
                place[name] = 1
            elif is_number and abs(inner) > EXACT_INTEGER_MAX:
                place[name] = 7
        if "previousId" in place and place["previousId"] == place.get("userId"):
            place["previousId"] = "before"


def shorten(body):
    """As many events, in a body that is not too large for them."""
    for name in ["batch", "events"]:
        items = body.get(name) if isinstance(body, dict) else None
        if isinstance(items, list) and len(items) > 100:
            items[:] = [{"type": "track", "event": "x", "userId": "u"}] * len(items)


@schemathesis.hook
def before_call(_context, case, kwargs):
    shorten(case.body)
    if case.meta is not None and case.meta.generation.mode.is_positive:
        mend(case.body)
        for places, name in [(case.headers, "X-Schema-Version"), (case.query, "schema_version")]:
            if places and name in places:
                places[name] = "1"
    if (case.headers or {}).get("Content-Encoding") in ("gzip", "x-gzip"):
        kwargs["auth"] = compressed


def fuzz(document, url, key):
    """Calls by the document and calls against it. Returns how many."""
    with tempfile.TemporaryDirectory() as home:
        file, config, report = Path(home, "openapi.json"), Path(home, "schemathesis.toml"), Path(home, "report.json")
        file.write_text(json.dumps(for_fuzzing(document)), encoding="utf-8")
        config.write_text(CONFIG.format(checks="\n".join(f"{check}.enabled = true" for check in CHECKS)))
        args = ["--config-file", str(config), "run", str(file), "--url", url, "--report-json-path", str(report)]
        for name, value in basic(key).items():
            args += ["--header", f"{name}: {value}"]
        said = io.StringIO()
        # Where Hypothesis keeps what it knows of a run.
        with contextlib.chdir(home), contextlib.redirect_stdout(said):
            try:
                command_line.main(args, standalone_mode=False)
            except SystemExit as ended:
                want(ended.code == 0, said.getvalue())
        done = json.loads(report.read_text(encoding="utf-8"))
        want(done["exit_code"] == 0 and done["complete"], said.getvalue())
        return done["operations"]["tested"], done["test_cases"]["generated"]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("key", nargs="?", default="")
    parser.add_argument("--document")
    given = parser.parse_args()
    start = time.monotonic()
    if given.document:
        document = json.loads(Path(given.document).read_text(encoding="utf-8"))
    else:
        document = requests.get(f"{given.url}/openapi.json", timeout=PATIENCE).json()
    check_document(document)
    if given.document:
        document["paths"].pop("/openapi.json")
    strict = closed(document)
    done = {"examples": check_examples(strict, given.url, given.key)}
    done["refused"] = check_refused(strict, given.url, given.key)
    check_what_is_no_operation(strict, given.url)
    if given.key:
        done["keys"] = check_keys(strict, given.url, given.key)
    done["operations"], done["cases"] = fuzz(document, given.url, given.key)
    done["seconds"] = round(time.monotonic() - start, 1)
    print(json.dumps(done))


if __name__ == "__main__":
    try:
        main()
    except Wrong as wrong:
        sys.exit(str(wrong))
