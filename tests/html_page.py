"""A page as its tags, refused where one is not closed."""

import html.parser


class Page(html.parser.HTMLParser):
    """Collect tags with their attributes; refuse what is not closed."""

    _ALONE = ("meta", "link", "img", "path", "rect", "circle")

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self._ALONE:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self._ALONE:
            assert self._open.pop() == tag
