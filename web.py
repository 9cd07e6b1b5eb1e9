"""The chat on a web page of this computer: files to drop, boxes by two clicks, answers as they come, overlays, players.

    python web.py                                           the small model that comes along, at http://127.0.0.1:7860
    python web.py weights/nextchat-7b-336 --port 8000       converted weights

In order: Guard (which requests are answered), Visit (a Session and what is shown), what the page does, examples, page.
It needs Gradio: pip install -e ".[web]". It listens to this computer alone; from afar: ssh -L 7860:127.0.0.1:7860 HOST.
Text of users and models is shown as it stands, never as HTML or Markdown. All files lie in one temporary folder.
"""
import argparse
import json
import os
import random
import re
import signal
import socket
import tempfile
import time
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial, wraps
from html import escape
from pathlib import Path

try:
    import gradio as gr
except ModuleNotFoundError:
    raise SystemExit("web.py needs Gradio: pip install -e '.[web]'") from None
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

import chat
import data
import shapes

# ---- Guard

LOCAL = re.compile(r"(127\.0\.0\.1|localhost)(:\d+)?")
API, MB = "/gradio_api", 1 << 20
PATHS = {"GET": re.compile(rf"/|/config|/theme\.css|/favicon\.ico|/manifest\.json|/(assets|static|svelte)/.*"
                           rf"|{API}/(info|startup-events|theme\.css|queue/data|upload_progress|heartbeat/\w+|file=.+)"),
         "POST": re.compile(rf"{API}/(queue/join|upload|cancel|reset/?)")}
PATHS["HEAD"] = PATHS["GET"]            # all that our own page asks for; Gradio itself would answer more
BIGGEST = {f"{API}/upload": 100 * MB}   # bytes of a request; of others 1 MB
FOLDER = 4096 * MB                      # bytes that all uploads may take together
FILES = 20                              # that one message may bring
HEADERS = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer", "content-security-policy":
           "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'none'; form-action 'none'"}


class Guard:
    """In front of Gradio (ASGI): only what our own page asks for gets through, about files of our folder."""

    def __init__(self, app, folder):
        self.app, self.folder = app, Path(folder).resolve()

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":                 # the server's own start and end
            return await self.app(scope, receive, send)
        try:
            receive = await self.check(scope, receive)
        except HTTPException as fault:
            return await PlainTextResponse(fault.detail, fault.status_code)(scope, receive, send)

        async def reply(message):
            if message["type"] == "http.response.start":
                message["headers"] += [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            await send(message)
        await self.app(scope, receive, reply)

    async def check(self, scope, receive):
        """-> a `receive` that gives the body of a good request. Raises HTTPException for what is wrong with another."""
        if scope["type"] != "http":
            raise HTTPException(403, "no such protocol")
        headers, method, path = Headers(scope=scope), scope["method"], scope["path"]
        self.check_sender(headers)
        self.check_page(method, path)
        if method == "POST":
            self.check_size(path, headers)
            if path not in BIGGEST:     # an upload is no JSON
                body, receive = await read_body(receive)
                self.check_body(body)
        return receive

    def check_sender(self, headers):
        """Names of other sites may lead here (DNS rebinding), their pages send us requests; browsers tell both."""
        host = ",".join(headers.getlist("host"))        # none or several are no name
        if not LOCAL.fullmatch(host) or {*headers.getlist("origin")} - {f"http://{host}"}:
            raise HTTPException(403, "not from this computer's own page")

    def check_page(self, method, path):
        if method not in PATHS:
            raise HTTPException(405, "no such method")
        if not PATHS[method].fullmatch(path) or re.search(r"\.\.|\\", path):
            raise HTTPException(404, "no such page")
        if name := path.partition(f"{API}/file=")[2]:   # what the page wants to show or play
            self.check_file(name)

    def check_size(self, path, headers):
        length = ",".join(headers.getlist("content-length"))            # none or several are no number
        if not length.isdecimal():                      # sent in chunks, it might never end
            raise HTTPException(411, "say how long it is")
        if int(length) > BIGGEST.get(path, MB):         # before a byte of it is read
            raise HTTPException(413, "too large")
        if path in BIGGEST and sum(file.stat().st_size for file in self.folder.rglob("*")) > FOLDER:
            raise HTTPException(507, "too many uploads; start the page again")

    def check_body(self, body):
        """JSON may name no file but ours: Gradio itself would fetch addresses."""
        pairs = []                      # (key, value) of all objects in it, however deep
        try:
            json.loads(body or "null", object_pairs_hook=pairs.extend)
        except (ValueError, RecursionError):
            raise HTTPException(400, "not JSON") from None
        for key, value in pairs:
            if key == "path":
                self.check_file(value)

    def check_file(self, name):
        """A file name must lead to a file in our folder, links followed."""
        with suppress(OSError, ValueError, TypeError):
            path = Path(name).resolve(strict=True)
            if path.is_file() and self.folder in path.parents:
                return
        raise HTTPException(403, "no such file")


async def read_body(receive):
    """-> the whole body of a request, and a `receive` that gives it again, then what comes after it."""
    parts = [await receive()]           # of the body, or the news that the browser has left
    while parts[-1].get("more_body"):
        parts.append(await receive())

    async def again():
        return parts.pop(0) if parts else await receive()
    return b"".join(part.get("body", b"") for part in parts), again


# ---- Visit

@dataclass(eq=False)
class Visit:
    """One open page: its conversation, and what is shown of it."""
    session: chat.Session
    folder: Path
    stopped: bool = False
    corner: dict = field(default_factory=dict)          # picture: the first of two clicks in it
    shown: dict = field(default_factory=dict)           # Turn -> files that show what it found and drew

    def messages(self, turns):
        """Turns for the chat window."""
        for turn in turns:
            yield from ({"role": "user", "content": {"path": medium.path}} for medium in turn.media)
            yield from ({"role": role, "content": escape(text, quote=False)}                # Gradio would show HTML
                        for role, text in (("user", turn.text), ("assistant", turn.answer)) if text)
            yield from ({"role": "assistant", "content": {"path": str(path)}} for path in self.shown.get(turn, ()))

    def keep(self, turn):
        """Write what a turn found and drew, as files to be shown."""
        found = chat.overlay(turn)
        self.shown[turn] = [chat.write_overlay(turn, found, self.folder)] if found else []
        self.shown[turn] += [chat.write_drawing(drawing, self.folder) for drawing in turn.drawn]


# ---- What the page does. Each takes the Visit and gives what show gives.

def show(visit, note="", turns=None, text=gr.skip()):
    """-> messages, picture, note, text to edit. turns: of an answer that is coming; else all, and what is attached."""
    if turns is not None:
        return list(visit.messages(turns)), gr.skip(), note, text       # skip: that part of the page stays as it is
    session, picture = visit.session, chat.last_picture(visit.session.media)
    messages = visit.messages([*session.turns, chat.Turn("", session.pending)])
    return list(messages), picture and chat.drawn(picture, session.boxes), note, text       # a picture to click in


def guarded(act):
    """An act whose errors that a user can mend become the note; what it was given stays as it was."""
    @wraps(act)                         # Gradio reads its parameters
    def run(visit, *given):
        try:
            return show(visit, act(visit, *given) or "")
        except data.FAULTS as error:
            return show(visit, f"{error!s:.500}")
    return run


@guarded
def attach(visit, paths):
    """Files for the next message: all, or none if one cannot be read."""
    if len(visit.session.pending) + len(paths) > FILES:
        raise ValueError(f"at most {FILES} files go with a message")
    visit.session.pending += [visit.session.read(path) for path in paths]


@guarded
def click(visit, event: gr.SelectData):
    """One corner of a box in the picture, or with the second click the box."""
    picture = chat.last_picture(visit.session.media)
    if picture not in visit.corner:
        visit.corner = {picture: event.index}
        return "now click the opposite corner"
    (x1, x2), (y1, y2) = map(sorted, zip(visit.corner.pop(picture), event.index))           # whichever came first
    return f"{visit.session.add_box((x1, y1, x2, y2))}; name it so in the message"          # pixels of the picture


@guarded
def undo(visit):
    """Take back the last box that waits to be sent, else the last file that does, else the last message."""
    session = visit.session
    if session.boxes:
        return f"taken back: {chat.spell(session.boxes.pop())}"
    return f"taken back: {Path(session.pending.pop().path).name if session.pending else session.undo().text}"


clear = guarded(lambda visit: visit.session.clear())


def stop(visit):                        # it runs beside the answer, which looks for this
    visit.stopped = True


def stream(visit, before, turn, ask, numbers):
    """Show the answer that ask() yields while it comes, ten times a second; whoever stops it keeps what was said.
    numbers: those under "settings" as they stand."""
    visit.stopped, due, session = False, 0, visit.session
    try:
        for name, number in zip(session.settings, numbers):
            if number != session.settings[name]:        # a seed that is set again would start again
                session.set(name, number)
        with closing(ask()) as pieces:
            for piece in pieces:
                turn.answer += piece
                if visit.stopped:
                    break                               # closing then keeps the turn, see Session.say
                if time.monotonic() > due:              # a page redrawn at each token would lag behind
                    yield show(visit, "", [*before, turn])
                    due = time.monotonic() + 0.1
            else:
                visit.stopped = False                   # too late: all was said and drawn
        visit.keep(session.last())
        yield show(visit, session.last().fault or "stopped" * visit.stopped)
    except data.FAULTS as error:
        yield show(visit, f"{error!s:.500}", text=turn.text)


def say(visit, text, find, *numbers):
    session, turn = visit.session, chat.Turn(text, visit.session.pending)
    if not text.strip():
        yield show(visit, "a message needs words")
        return
    yield show(visit, "", [*session.turns, turn], "")                   # at once, before any media are encoded
    yield from stream(visit, session.turns, turn, partial(session.say, text, find=find), numbers)


def retry(visit, *numbers):
    *before, last = visit.session.turns or [chat.Turn("", [])]          # without any, Session.retry says so
    yield from stream(visit, before, chat.Turn(last.text, last.media), visit.session.retry, numbers)


# ---- Examples

def question(m, kind):
    return next(text for what, text, _ in m.questions if what == kind)


def wish(m):
    return shapes.request(m, random, 2023)["conversation"][0]["value"]


ABILITIES = {                           # button: what the model must read or write, kind of file, message about it
    "describe": ("image", "image", partial(question, kind="caption")),
    "count": ("image", "image", partial(question, kind="count")),
    "watch": ("video", "video", partial(question, kind="caption")),
    "listen": ("audio", "audio", partial(question, kind="caption")),
    "point": ("at", "image", lambda m: f"Where is the {m.things[0].name}?"),
    "find": ("vg", "image", lambda m: f"Where is the {m.things[0].name}?"),
    "name a box": ("box", "image", lambda m: "What is [0]?"),
    "name a region": ("region", "image", lambda m: "What is [0]?"),
    "draw": ("img", "drawing", wish), "film": ("vid", "video", wish), "play": ("aud", "audio", wish),
}


def example(visit, ability):
    """Draw something new for an ability and attach it; the message waits to be sent."""
    (need, kind, message), session = ABILITIES[ability], visit.session
    m = shapes.write_medium((kind, random.randrange(10 ** 6), 0, visit.folder))
    if message is not wish:             # a wish is for something that does not exist yet
        session.pending.append(session.read(str(visit.folder / m.name)))
    if need in ("box", "region"):
        session.add_box(shapes.box(m.things[0]), need)
    return show(visit, text=message(m))


# ---- Page

def build(session, folder):
    """The page as Gradio's blocks. Every visit has a conversation of its own with the one model."""
    def new_visit():
        parts = session.model, session.tok, session.system, session.template, session.spec, session.max_len
        own = chat.Session(*parts, painters=session.painters, **session.settings)
        own.load_painter = session.load_painter         # shared, for they are loaded when they are first needed
        return Visit(own, folder)
    cfg = session.model.cfg
    with gr.Blocks(title="nanomni", analytics_enabled=False) as blocks:
        visit = gr.State()                              # each page that is opened has its own
        with gr.Row():
            with gr.Column(scale=3):
                talk = gr.Chatbot(render_markdown=False, label="conversation", height=520, buttons=[])
                text = gr.Textbox(label="message", placeholder="Enter sends", max_length=20000, elem_id="message")
                with gr.Row():
                    buttons = {name: gr.Button(name, size="sm", min_width=60)
                               for name in ("send", "stop", "retry", "undo", "clear")}
                gr.Markdown("Examples, drawn anew at each click; then send:")
                with gr.Row():
                    abilities = {name: gr.Button(name, size="sm", min_width=60)
                                 for name, (need, *_) in ABILITIES.items() if need in (*cfg.reads, *cfg.writes)}
            with gr.Column(scale=2):
                files = gr.File(label="pictures, sounds, clips", file_count="multiple", height=120)
                picture = gr.Image(label="two clicks make a box", interactive=False, format="png", buttons=[],
                                   elem_id="picture")
                note = gr.Textbox(label="note", interactive=False, elem_id="note")
                find = gr.Checkbox(label="look for a box", visible="vg" in cfg.writes)
                with gr.Accordion("settings", open=False):
                    numbers = [gr.Number(value, label=name, info=chat.SETTINGS[name][3])
                               for name, value in session.settings.items()]
        view, private = [talk, picture, note, text], dict(api_visibility="private", show_progress="hidden")
        one = dict(concurrency_id="model", concurrency_limit=1, **private)              # the model serves one at a time
        blocks.load(new_visit, None, visit, **private)
        gr.on([text.submit, buttons["send"].click], say, [visit, text, find, *numbers], view, **one)
        buttons["retry"].click(retry, [visit, *numbers], view, **one)
        buttons["stop"].click(stop, visit, None, **private)             # beside the answer that it stops
        for name, act in {"undo": undo, "clear": clear}.items():
            buttons[name].click(act, visit, view, **one)
        talk.clear(clear, visit, view, **one)           # the bin that Gradio puts above it
        for name, button in abilities.items():
            button.click(partial(example, ability=name), visit, view, **one)
        files.upload(attach, [visit, files], view, **one).then(lambda: None, None, files, **private)    # empties the box
        picture.select(click, visit, view, **one)
    return blocks


def serve(session, folder, port=None):
    """Answer at a port of this computer; files go into a folder."""
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=str(folder))
    for name, _, _ in shapes.MEDIA.values():
        (folder / name).mkdir()
    blocks = build(session, folder).queue(max_size=16)
    blocks.launch(server_name="127.0.0.1", server_port=port, share=False, ssr_mode=False, enable_monitoring=False,
                  run_history=False, footer_links=[], max_file_size=BIGGEST[f"{API}/upload"], quiet=True,
                  # Share would send to a site of Gradio's; models, and so boxes, know no EXIF rotation
                  css="[aria-label=Share] {display: none} img {image-orientation: none}",
                  prevent_thread_lock=True, app_kwargs={"middleware": [Middleware(Guard, folder=folder)]})
    return blocks


def port(text):                         # 0: any that is free
    return range(1 << 16).index(int(text))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("weights", nargs="?", default=chat.TINY, help="weights folder (weights/tiny)")
    p.add_argument("--port", type=port, default=7860, help="default %(default)s")
    p.add_argument("--device", help="cuda, mps, cpu ... (the best there is)")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights")
    p.add_argument("--quantize", choices=("int8", "int4"), default="", help="keep the language model in 8 or 4 bits")
    p.add_argument("--painters", metavar="FOLDER", help="holds a folder per painter (painters, in the weights folder)")
    p.add_argument("--template", metavar="NAME", default="", help="row of data.TEMPLATES (the model's own)")
    args = vars(p.parse_args())
    with socket.create_server(("127.0.0.1", args.pop("port"))) as probe:  # in use: an error now, not after loading
        free = probe.getsockname()[1]
    signal.signal(signal.SIGTERM, signal.default_int_handler)           # so that the folder of uploads goes then, too
    with tempfile.TemporaryDirectory(prefix="nanomni-") as folder:
        session = chat.open_session(args.pop("weights"), **args)
        page = serve(session, Path(folder).resolve(), free)
        print(f"the page is at http://127.0.0.1:{page.server_port}; Ctrl-C ends", flush=True)
        page.block_thread()


if __name__ == "__main__":
    data.program(main)
