// Dark or light, before the first paint: the reader's choice, else what the system prefers.
(() => {
  "use strict";
  const key = "mft-theme";
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;
  let chosen = null;
  try {
    chosen = localStorage.getItem(key);
  } catch {
    // a private window keeps no choice
  }
  const show = () => {
    const theme = chosen || (system.matches ? "dark" : "light");
    root.dataset.bsTheme = theme;
    root.classList.toggle("quarto-dark", theme === "dark");
  };
  window.toggleTheme = () => {
    chosen = root.dataset.bsTheme === "dark" ? "light" : "dark";
    try {
      localStorage.setItem(key, chosen);
    } catch {
      // the choice holds for this page
    }
    show();
  };
  system.addEventListener("change", show);
  show();
})();
