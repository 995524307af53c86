/* What is wider than the page scrolls by itself, so the keyboard must be able to reach it. The theme
does this for code and its own tables; this does it for data frames, figures and displayed formulas. */
(function () {
  "use strict";
  const WIDE = ".bd-article :is(.cell_output table, table.docutils, figure, div.math, mjx-container[display])";
  function mark() {
    for (const element of document.querySelectorAll(WIDE)) {
      if (element.scrollWidth > element.clientWidth) element.tabIndex = 0;
      else element.removeAttribute("tabindex");
    }
  }
  let due = 0;
  function later() {
    clearTimeout(due);
    due = setTimeout(mark, 300);
  }
  window.addEventListener("resize", later);
  window.addEventListener("load", () => {
    mark();
    const ready = window.MathJax && window.MathJax.startup && window.MathJax.startup.promise;
    if (ready) ready.then(mark);
  });
})();
