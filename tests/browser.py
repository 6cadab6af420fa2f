"""A page in Chromium, as Qt has it: ``python browser.py PAGE WIDTH SCRIPT`` prints what the script gives, as JSON.

A process of its own, for Qt wants the first thread and its own loop. Ends with 77 where Qt cannot be loaded.
"""

import json
import os
import sys

os.environ |= {"QT_QPA_PLATFORM": "offscreen", "QTWEBENGINE_DISABLE_SANDBOX": "1"}
os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = "--disable-gpu"
try:
    from PyQt6.QtCore import QEventLoop, QMarginsF, QUrl
    from PyQt6.QtGui import QPageLayout, QPageSize
    from PyQt6.QtWebEngineCore import QWebEnginePage
    from PyQt6.QtWebEngineWidgets import QWebEngineView
    from PyQt6.QtWidgets import QApplication
except ImportError as error:
    print(error, file=sys.stderr)
    sys.exit(77)

app, said = QApplication(sys.argv[:1]), []


class Page(QWebEnginePage):
    def javaScriptConsoleMessage(self, level, message, line, source):
        said.append(message)


def until(start):
    """What is given to the function that ``start`` is called with, once it is."""
    loop, found = QEventLoop(), []
    start(lambda *given: (found.extend(given), loop.quit()))
    if not found:
        loop.exec()
    return found[0]


def main(path, width, script):
    view = QWebEngineView()
    page = Page(view)
    view.setPage(page)
    page.settings().setAttribute(page.settings().WebAttribute.ShowScrollBars, False)  # as on a telephone
    view.resize(int(width), 900)
    view.show()
    until(lambda done: (page.loadFinished.connect(done), page.load(QUrl.fromLocalFile(path))))
    found = until(lambda done: page.runJavaScript(f"JSON.stringify({script})", done))
    sheet = QPageLayout(QPageSize(QPageSize.PageSizeId.A4), QPageLayout.Orientation.Portrait, QMarginsF(36, 36, 36, 36))
    printed = until(lambda done: page.printToPdf(done, sheet))
    view.grab().save(f"{path}.{width}.png")
    print(json.dumps({"found": json.loads(found), "console": said, "printed": printed.size()}))
    sys.stdout.flush()
    os._exit(0)  # Qt's own farewell takes seconds


main(*sys.argv[1:])
