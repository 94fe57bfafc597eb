"""The page at `/`: its files, and the headers that let it load and call nothing but this server."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import Response

FOLDER = Path(__file__).parent
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".txt": "text/plain"}
FILES = {f"/page/{path.name}": path for path in sorted(FOLDER.iterdir()) if path.suffix in TYPES}
FILES["/"] = FOLDER / "index.html"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_page(app: FastAPI) -> None:
    """Serve the page. It has no secrets, so it needs no key; what it calls does."""
    for address, path in FILES.items():
        app.get(address, include_in_schema=False)(_sender(path))


def _sender(path: Path):
    content, kind = path.read_bytes(), TYPES[path.suffix]

    async def send() -> Response:
        return Response(content, headers=HEADERS, media_type=f"{kind}; charset=utf-8")

    return send
