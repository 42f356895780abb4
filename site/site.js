// Search, dark mode, boxes that scroll, and the menu on a phone. No request leaves the site.
(() => {
  "use strict";
  const one = (selector, from = document) => from.querySelector(selector);
  const all = (selector, from = document) => [...from.querySelectorAll(selector)];
  const root = one('meta[name="smalldocs:offset"]').content;

  // ---- dark or light
  all(".theme-button").forEach((button) => button.addEventListener("click", window.toggleTheme));

  // ---- a box that scrolls can be reached by the keyboard, and says that it scrolls
  const boxes = all("main .table-box, main pre, main .math.display, #quarto-margin-sidebar");
  const look = (box) => {
    const wide = box.scrollWidth > box.clientWidth + 1;
    const scrolls = wide || (box.id && box.scrollHeight > box.clientHeight + 1);
    if (scrolls) {
      box.tabIndex = 0;
      box.setAttribute("role", "group");
      box.setAttribute("aria-label", box.dataset.label || "On this page");
    } else {
      ["tabindex", "role", "aria-label"].forEach((name) => box.removeAttribute(name));
    }
    const frame = box.closest(".table-frame");
    if (frame) {
      const end = box.scrollLeft + box.clientWidth >= box.scrollWidth - 2;
      frame.classList.toggle("scrolls", wide);
      frame.classList.toggle("at-end", end);
    }
  };
  const watcher = new ResizeObserver((entries) => entries.forEach(({ target }) => look(target)));
  boxes.forEach((box) => {
    watcher.observe(box);
    box.addEventListener("scroll", () => look(box), { passive: true });
  });

  // ---- code that is unfolded has its size only then
  all("details").forEach((details) =>
    details.addEventListener("toggle", () => all("pre, .table-box", details).forEach(look)),
  );

  // ---- the menu of all pages: its button says whether it is open; Escape closes it
  const menu = one("#quarto-sidebar");
  const opener = one(".quarto-btn-toggle");
  if (menu && opener) {
    const phone = window.matchMedia("(max-width: 991.98px)");
    const tell = () => {
      const open = menu.classList.contains("show");
      opener.setAttribute("aria-expanded", String(open));
      menu.inert = phone.matches && !open;
      document.body.classList.toggle("menu-open", phone.matches && open);
    };
    new MutationObserver(tell).observe(menu, { attributeFilter: ["class"] });
    phone.addEventListener("change", tell);
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && phone.matches && menu.classList.contains("show")) {
        opener.click();
        opener.focus();
      }
    });
    tell();
  }
  const current = one("#quarto-sidebar .sidebar-link.active");
  if (current && current.offsetTop > menu.clientHeight - 100) {
    menu.scrollTop = current.offsetTop - menu.clientHeight / 2;
  }

  // ---- search: the index is a script, since a page from the disk may not fetch a file
  const box = one(".site-search");
  const input = one("input", box);
  const results = one(".site-search-results", box);
  const status = one("[role=status]", box);
  const shown = 12;
  let engine = null;

  const load = (path) =>
    new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = root + path;
      script.onload = resolve;
      script.onerror = () => reject(new Error(`${path} could not be read`));
      document.head.append(script);
    });

  const prepare = () => {
    engine ??= Promise.all([load("site_libs/minisearch/minisearch.js"), load("search-index.js")]).then(
      () => {
        const search = new window.MiniSearch({
          fields: ["title", "section", "text"],
          storeFields: ["title", "section", "text", "href"],
          // a name such as `save_pretrained` is found whole, and by each of its words
          tokenize: (text) => text.split(/[^\p{L}\p{N}_]+/u).flatMap((word) => [word, ...word.split("_")]),
        });
        search.addAll(window.siteIndex);
        return search;
      },
    );
    return engine;
  };

  const excerpt = (text, terms) => {
    const places = terms.map((term) => text.toLowerCase().indexOf(term)).filter((at) => at >= 0);
    const start = Math.max(0, Math.min(...places, text.length) - 60);
    const part = text.slice(places.length ? start : 0, (places.length ? start : 0) + 180);
    const piece = document.createElement("span");
    piece.className = "found-text";
    const escaped = terms.map((term) => term.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
    const words = new RegExp(`(${escaped.join("|")})`, "i");
    part.split(words).forEach((bit, number) => {
      const mark = number % 2 ? document.createElement("mark") : document.createElement("span");
      mark.textContent = bit;
      piece.append(mark);
    });
    return piece;
  };

  const line = (className, text) => {
    const element = document.createElement("span");
    element.className = className;
    element.textContent = text;
    return element;
  };

  const hide = () => {
    results.hidden = true;
  };

  // what the project found comes before how it is programmed, and a mask before the rest of that
  const weightOf = (href) =>
    /^(findings|tutorials|index|glossary)/.test(href) ? 1.5 : /^[0-9]+_mask\.html/.test(href) ? 1.3 : 1;

  const find = async () => {
    const query = input.value.trim();
    if (query.length < 2) {
      hide();
      status.textContent = "";
      return;
    }
    const search = await prepare();
    const hits = search.search(query, {
      prefix: true,
      fuzzy: (term) => (term.length > 4 ? 0.2 : false),
      boost: { title: 3, section: 2 },
      combineWith: "AND",
      boostDocument: (id, term, entry) => weightOf(entry.href),
    });
    const links = hits.slice(0, shown).map((hit) => {
      const link = document.createElement("a");
      link.href = root + hit.href;
      link.append(line("found-title", hit.title));
      if (hit.section) {
        link.append(line("found-section", hit.section));
      }
      link.append(excerpt(hit.text, hit.terms));
      return link;
    });
    const none = line("found-nothing", `Nothing found for “${query}”. Try another word.`);
    results.replaceChildren(...(links.length ? links : [none]));
    results.hidden = false;
    status.textContent = links.length ? `${links.length} places found` : none.textContent;
  };

  let waiting = 0;
  input.addEventListener("focus", prepare);
  input.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(find, 100);
  });
  box.addEventListener("keydown", (event) => {
    const stops = [input, ...all("a", results)];
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step && !results.hidden) {
      event.preventDefault();
      const at = stops.indexOf(document.activeElement) + step;
      stops[(at + stops.length) % stops.length].focus();
    } else if (event.key === "Enter" && document.activeElement === input && stops[1]) {
      stops[1].click();
    } else if (event.key === "Escape") {
      hide();
      input.focus();
    }
  });
  results.addEventListener("click", hide);
  document.addEventListener("click", (event) => {
    if (!box.contains(event.target)) {
      hide();
    }
  });
  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest("input, textarea, select");
    if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey) {
      event.preventDefault();
      one(".navbar-collapse").classList.add("show");
      input.focus();
    }
  });
})();
