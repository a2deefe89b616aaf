// Metadata contexts, section "Metadata querying".

package intercept

import (
	"context"
	"encoding/binary"
	"slices"
	"strings"
)

// meta serves LIST_META_CONTEXT and SET_META_CONTEXT.
func (h *handshake) meta(ctx context.Context, id uint32, data []byte) {
	set := id == NBD_OPT_SET_META_CONTEXT
	if set {
		// "Issuing this command replaces all previously-set metadata contexts
		// (including when this command fails)."
		h.metaFor, h.contexts = "", nil
		if h.style == simple {
			h.fail(id, NBD_REP_ERR_INVALID, "structured replies were not negotiated")
			return
		}
	}
	name, queries, ok := parseMeta(data)
	if !ok {
		h.fail(id, NBD_REP_ERR_INVALID, "malformed request")
		return
	}
	e, ok := h.open(ctx, id, name)
	if !ok {
		return
	}
	defer e.Release()
	m, _ := e.Device.(Mapper)
	if !set {
		for _, c := range listContexts(m, queries) {
			h.replyContext(id, 0, c)
		}
		h.ack(id)
		return
	}
	selected := selectContexts(m, queries)
	if len(selected) > maxContexts {
		h.fail(id, NBD_REP_ERR_TOO_BIG, "too many metadata contexts")
		return
	}
	h.metaFor, h.contexts = e.Name, selected
	for i, c := range selected {
		h.replyContext(id, uint32(i), c)
	}
	h.ack(id)
}

func (h *handshake) replyContext(option, id uint32, c metaContext) {
	h.reply(option, NBD_REP_META_CONTEXT, 4+len(c))
	h.write(id)
	h.out.WriteString(string(c))
}

// listContexts returns what is offered of what was asked for: everything if
// nothing was, a whole namespace for one that is followed by nothing. What is
// before the last colon is a namespace here, so that qemu:dirty-bitmap: is one
// too. Unknown ones are ignored.
func listContexts(m Mapper, queries []string) []metaContext {
	if m == nil {
		return nil
	}
	var list []metaContext
	for _, c := range m.Contexts() {
		if len(queries) == 0 || slices.ContainsFunc(queries, func(q string) bool {
			return strings.HasSuffix(q, ":") && strings.HasPrefix(c, q)
		}) {
			list = append(list, metaContext(c))
		}
	}
	return unique(append(list, selectContexts(m, queries)...))
}

// selectContexts returns the contexts that queries name; wildcards name none.
func selectContexts(m Mapper, queries []string) []metaContext {
	if m == nil {
		return nil
	}
	var list []metaContext
	for _, q := range queries {
		if m.HasContext(q) {
			list = append(list, metaContext(q))
		}
	}
	return unique(list)
}

// unique returns list without what it holds twice, in its order.
func unique(list []metaContext) []metaContext {
	seen := map[metaContext]bool{}
	return slices.DeleteFunc(list, func(c metaContext) bool {
		was := seen[c]
		seen[c] = true
		return was
	})
}

// parseMeta takes the data of either option apart. It returns false if a byte
// has no place or a query has no namespace.
func parseMeta(data []byte) (name string, queries []string, ok bool) {
	name, data, ok = cutString(data)
	if !ok || len(data) < 4 {
		return "", nil, false
	}
	n := binary.BigEndian.Uint32(data)
	data = data[4:]
	for ; n > 0; n-- {
		var q string
		if q, data, ok = cutString(data); !ok || strings.Index(q, ":") < 1 {
			return "", nil, false
		}
		queries = append(queries, q)
	}
	return name, queries, len(data) == 0
}
