"""Load test over HTTP of the embedded model's service: `python -m examples.serve.load` beside `serve run` (README.md).

Every good request has an image of its own. What vqfast says of it alone, outside the service, is computed first; an
answer is the request's own when its numbers are nearer to this than to what is expected of any other request. Exits
with 1 when an answer is not, when a request gets no response (where a replica was killed, a connection that breaks is
one), or when a bad request is not refused as it should be.
"""

import argparse
import asyncio
import io
import json
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from itertools import chain, cycle, islice, repeat
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import ray
import torch
from PIL import Image
from ray import serve

import vqfast
from vqfast import zoo

COMPARED = ("entropy_before", "entropy_start", "entropy_after", "confidence_before", "confidence_after")
ANSWERS = ("answer_before", "answer_after")
BAD_EVERY = 10  # requests
TIMEOUT_S = 60  # above the service's own limit
REFUSED = (408, 500, 503)  # too late, replica lost, queue full: may be sent again
BROKEN = ("ReadError", "RemoteProtocolError")  # a replica was lost after the first byte of its reply
Outcome = dict[str, Any]


def png(image: Image.Image) -> bytes:
    image.save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def form(image: bytes, question: str) -> dict[str, Any]:
    return {"files": {"image": image}, "data": {"question": question}}


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


def bad_requests() -> list[tuple[str, int, dict[str, Any]]]:
    """(what is wrong, the status that it gets, what httpx is told)"""
    digit, question = png(Image.new("RGB", (32, 32))), zoo.QUESTIONS[0]
    return [
        ("broken image", 422, form(digit[:60], question)),
        ("no image", 422, form(question.encode(), question)),
        ("too many pixels", 422, form(png(Image.new("1", (5000, 4000))), question)),
        ("body too large", 413, form(bytes(9_000_000), question)),
        ("no Content-Length", 411, {"content": chunks(digit)}),
        ("unknown word", 422, form(digit, "which cat?")),
        ("second image token", 422, form(digit, f"<image> {question}")),
        ("question too long", 422, form(digit, question * 50)),
        ("field missing", 422, {"files": {"image": digit}}),
        ("not a form", 422, {"json": {"question": question}}),
        ("wrong method", 405, {"method": "GET"}),
    ]


def good_requests(count: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Digits with noise, and what vqfast says of each alone."""
    torch.set_num_threads(1)
    model, processor = zoo.load()
    requests, expected = [], []
    with vqfast.TestTimeTuner(model, vqfast.TuningConfig(candidates="default")) as tuner:
        for index, (image, text, _) in enumerate(islice(cycle(zoo.questions("test")), count)):
            rng = np.random.default_rng(index)
            noisy = np.asarray(image) + rng.normal(0, rng.uniform(20, 60), (32, 32, 3))
            image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
            requests.append(form(png(image), zoo.QUESTIONS[index % len(zoo.QUESTIONS)]))
            inputs = processor(images=image, text=text, return_tensors="pt")
            result = tuner.tune(**inputs)
            before = model.generate(**inputs)
            with tuner.applied(result):
                after = model.generate(**inputs)
            answers = processor.batch_decode(torch.cat([before, after])[:, -2:-1])  # one word and </s>
            expected.append(dict(zip(ANSWERS, answers, strict=True)) | result.to_dict()["samples"][0])
    return requests, expected


async def send(client: httpx.AsyncClient, outcome: Outcome, request: dict[str, Any], retries: int) -> None:
    """Fill in the statuses of all attempts, the seconds they took together and the reply to the last."""
    request = {"method": "POST", **request}
    request["headers"] = {"x-request-id": outcome["id"], **request.get("headers", {})}
    start = time.perf_counter()
    for attempt in range(retries + 1):
        await asyncio.sleep(0.5 * attempt)
        try:
            response = await client.request(url="/answer", **request)
        except httpx.TransportError as error:
            outcome["statuses"].append(type(error).__name__)
            continue
        outcome["statuses"].append(response.status_code)
        if response.status_code not in REFUSED:
            break
    outcome["seconds"] = time.perf_counter() - start
    if outcome["statuses"][-1] == 200:
        outcome["reply"] = response.json()


async def run(url: str, requests: list[dict[str, Any]], options: argparse.Namespace) -> tuple[list[Outcome], float]:
    bad = chain.from_iterable(bad_requests() for _ in repeat(None))
    outcomes, work = [], []
    for index, request in enumerate(requests):
        work.append(({"good": index}, request))
        if index % BAD_EVERY == BAD_EVERY - 1:
            problem, status, request = next(bad)
            work.append(({"bad": problem, "deserved": status}, request))
    queue = enumerate(work)

    async def client_loop() -> None:
        for number, (about, request) in queue:
            outcome = {"id": f"load-{number}", "statuses": [], **about}
            outcomes.append(outcome)
            await send(client, outcome, request, options.retries if "good" in about else 0)
            if options.kill_replica and number == len(work) // 2:
                options.killed_at = await asyncio.to_thread(kill_replica)

    limits = httpx.Limits(max_connections=options.concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits, trust_env=False) as client:
        start = time.perf_counter()
        await asyncio.gather(*(client_loop() for _ in range(options.concurrency)))
        return outcomes, time.perf_counter() - start


def replicas() -> list[str]:
    return [name for name in ray.util.list_named_actors() if name.startswith("SERVE_REPLICA::vqfast#")]


def kill_replica() -> float:
    """End one replica's process as a crash would; returns when."""
    name = random.choice(replicas())
    ray.kill(ray.get_actor(name))
    print("killed", name, file=sys.stderr)
    return time.perf_counter()


def recovered(count: int, since: float) -> float | None:
    """Seconds from `since` until that many replicas run again; None: not within two minutes."""
    while time.perf_counter() - since < 120:
        states = serve.status().applications["vqfast"].deployments["VisionAnswers"].replica_states
        if len(replicas()) >= count and states.get("RUNNING", 0) >= count:
            return round(time.perf_counter() - since, 1)
        time.sleep(0.2)
    return None


def summary(outcomes: list[Outcome], expected: list[dict[str, Any]], seconds: float, killed: bool) -> dict[str, Any]:
    good = [outcome for outcome in outcomes if "good" in outcome]
    answered = [outcome for outcome in good if "reply" in outcome]
    numbers = np.array([[one[name] for name in COMPARED] for one in expected])
    others = [float("inf")]
    deviations, foreign = [0.0], []
    for outcome in answered:
        own, reply = outcome["good"], outcome["reply"]
        distances = np.abs(numbers - [reply[name] for name in COMPARED]).max(1)
        deviations.append(distances[own])
        same = all(reply[name] == expected[own][name] for name in ANSWERS)
        if distances.argmin() != own or not same or reply["request_id"] != outcome["id"]:
            foreign.append({"expected": expected[own], "got": reply})
        others.append(np.delete(distances, own).min() if len(distances) > 1 else np.inf)
    latencies = [1000 * outcome["seconds"] for outcome in answered] or [float("nan")]
    quantiles = dict(zip(("p50", "p90", "p99"), np.percentile(latencies, (50, 90, 99)).round(1).tolist(), strict=True))
    lost = (*REFUSED, *BROKEN) if killed else REFUSED
    unrefused = [o for o in outcomes if "bad" in o and o["statuses"][-1] not in (o["deserved"], *lost)]
    endless = [o for o in outcomes if isinstance(o["statuses"][-1], str) and o["statuses"][-1] not in lost]
    return {
        "good requests": len(good),
        "bad requests": len(outcomes) - len(good),
        "seconds": round(seconds, 2),
        "good answers per second": round(len(answered) / seconds, 1),
        "latency of good answers, ms": quantiles,
        "first statuses of good requests": Counter(str(outcome["statuses"][0]) for outcome in good),
        "last statuses of good requests": Counter(str(outcome["statuses"][-1]) for outcome in good),
        "statuses of bad requests": Counter(f"{o['bad']}: {o['statuses'][-1]}" for o in outcomes if "bad" in o),
        "answers that are another's": foreign,
        "largest difference to the request alone": max(deviations),
        "smallest difference to another request": min(others),
        "bad requests not refused": unrefused,
        "requests without a response": endless,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--requests", type=int, default=200, help=f"good ones; one in {BAD_EVERY} bad comes on top")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--retries", type=int, default=0, help="after a 408, 500, 503 or a broken connection")
    parser.add_argument("--kill-replica", action="store_true", help="when half of the requests are answered")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    requests, expected = good_requests(options.requests)
    if options.kill_replica:
        ray.init("auto", namespace="serve", log_to_driver=False)
        count = len(replicas())
    outcomes, seconds = asyncio.run(run(options.url, requests, options))
    report = {"replicas": count} if options.kill_replica else {}
    report |= {"concurrency": options.concurrency, "retries": options.retries, "killed a replica": options.kill_replica}
    report |= summary(outcomes, expected, seconds, options.kill_replica)
    if options.kill_replica:
        report["seconds from the kill until all replicas run"] = recovered(count, options.killed_at)
    text = json.dumps(report, indent=2)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")
    failed = ("answers that are another's", "bad requests not refused", "requests without a response")
    sys.exit(any(report[name] for name in failed))


if __name__ == "__main__":
    main()
