"""A window that shows annotated pictures as they come, where there is a display."""

from PIL import Image

from tools.client.outputs import Closed, Output, Result
from tools.errors import ToolError


class Window(Output):
    """Raises ToolError where no window can be opened; `add` raises Closed after it was closed."""

    def __init__(self) -> None:
        try:
            import tkinter

            from PIL import ImageTk

            self._root = tkinter.Tk()
        except (ImportError, RuntimeError) as error:
            raise ToolError(f"--view cannot open a window ({error}); leave it out, or use --save DIR") from error
        except tkinter.TclError as error:
            raise ToolError(f"--view cannot open a window ({error}); leave it out, or use --save DIR") from error
        self._image = ImageTk
        self._label = tkinter.Label(self._root)
        self._label.pack()
        self._closed = False
        self._root.protocol("WM_DELETE_WINDOW", self._close)

    def _close(self) -> None:
        self._closed = True

    def add(self, result: Result) -> None:
        image = Image.fromarray(result.drawn)
        image.thumbnail((self._root.winfo_screenwidth() * 9 // 10, self._root.winfo_screenheight() * 8 // 10))
        shown = self._image.PhotoImage(image)
        self._label.configure(image=shown)
        self._shown = shown  # Tk keeps no reference of its own
        self._root.title(result.answer.source)
        self._root.update()
        if self._closed:
            raise Closed
