package intercept

import (
	"encoding/binary"
	"iter"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// contextReplies are the names in replies to LIST_ or SET_META_CONTEXT, and an
// error if there is one.
func contextReplies(t *testing.T, replies []optionReply) (names []string, ids []uint32, final uint32) {
	t.Helper()
	for _, r := range replies {
		if r.typ != NBD_REP_META_CONTEXT {
			return names, ids, r.typ
		}
		ids = append(ids, binary.BigEndian.Uint32(r.data))
		names = append(names, string(r.data[4:]))
	}
	return names, ids, 0
}

func TestListContexts(t *testing.T) {
	exports := newShelf(map[string]Device{"disk": newMemory(1 << 20), "plain": plain{newMemory(1 << 20)}})
	_, addr := startServer(t, Options{Exports: exports})
	const alloc, since2 = "base:allocation", "qemu:dirty-bitmap:since-2"
	for _, tc := range []struct {
		name    string
		export  string
		queries []string
		want    []string
	}{
		{"all", "disk", nil, []string{alloc, dirtyBitmap}},
		{"base namespace", "disk", []string{"base:"}, []string{alloc}},
		{"qemu namespace", "disk", []string{"qemu:"}, []string{dirtyBitmap}},
		{"all bitmaps", "disk", []string{"qemu:dirty-bitmap:"}, []string{dirtyBitmap}},
		{"both", "disk", []string{"qemu:", "base:"}, []string{alloc, dirtyBitmap}},
		{"by name", "disk", []string{dirtyBitmap}, []string{dirtyBitmap}},
		{"found by name only", "disk", []string{since2}, []string{since2}},
		{"twice", "disk", []string{alloc, "base:", alloc}, []string{alloc}},
		{"unknown leaf", "disk", []string{"base:nothing"}, nil},
		{"unknown namespace", "disk", []string{"x-mine:", "x-mine:yours"}, nil},
		{"unknown and known", "disk", []string{"x-mine:", alloc}, []string{alloc}},
		{"device without contexts", "plain", nil, nil},
		{"device without contexts, by name", "plain", []string{alloc}, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := dial(t, addr)
			c.wantFinal(NBD_OPT_STRUCTURED_REPLY, nil, NBD_REP_ACK)
			got, ids, final := contextReplies(t, c.option(NBD_OPT_LIST_META_CONTEXT, metaData(tc.export, tc.queries...)))
			if final != NBD_REP_ACK || !slices.Equal(got, tc.want) {
				t.Errorf("contexts listed\n got %q, %#x\nwant %q", got, final, tc.want)
			}
			if slices.Max(append(ids, 0)) != 0 {
				t.Errorf("ids in the list\n got %v\nwant zeroes", ids)
			}
			// What can be listed by name can be selected; a wildcard selects
			// nothing.
			want := slices.DeleteFunc(slices.Clone(tc.want), func(s string) bool { return !slices.Contains(tc.queries, s) })
			got, ids, final = contextReplies(t, c.option(NBD_OPT_SET_META_CONTEXT, metaData(tc.export, tc.queries...)))
			if final != NBD_REP_ACK || !slices.Equal(got, want) {
				t.Errorf("contexts selected\n got %q, %#x\nwant %q", got, final, want)
			}
			if slices.Sort(ids); len(slices.Compact(ids)) != len(got) {
				t.Errorf("ids %v are not unique", ids)
			}
		})
	}
}

func TestTooManyContexts(t *testing.T) {
	c := dial(t, serveDevice(t, &manyContexts{newMemory(1 << 20)}))
	c.wantFinal(NBD_OPT_STRUCTURED_REPLY, nil, NBD_REP_ACK)
	var queries []string
	for range maxContexts + 1 {
		queries = append(queries, "x-many:"+strings.Repeat("a", len(queries)+1))
	}
	c.wantFinal(NBD_OPT_SET_META_CONTEXT, metaData("disk", queries...), NBD_REP_ERR_TOO_BIG)
	c.wantFinal(NBD_OPT_SET_META_CONTEXT, metaData("disk", queries[1:]...), NBD_REP_ACK)
}

// manyContexts has a context of every name.
type manyContexts struct{ *memory }

func (*manyContexts) HasContext(string) bool { return true }

// TestContextsOfAnotherExport selects contexts in ways that leave none for the
// session, so that BLOCK_STATUS is refused.
func TestContextsOfAnotherExport(t *testing.T) {
	exports := newShelf(map[string]Device{"disk": newMemory(1 << 20), "other": newMemory(1 << 20)})
	_, addr := startServer(t, Options{Exports: exports})
	for _, tc := range []struct {
		name  string
		setup func(c *client)
		want  uint32
	}{
		{"same export", func(c *client) {
			c.wantFinal(NBD_OPT_SET_META_CONTEXT, metaData("disk", "base:allocation"), NBD_REP_ACK)
		}, 0},
		{"the default by its other name", func(c *client) {
			c.wantFinal(NBD_OPT_SET_META_CONTEXT, metaData("", "base:allocation"), NBD_REP_ACK)
		}, 0},
		{"another export", func(c *client) {
			c.wantFinal(NBD_OPT_SET_META_CONTEXT, metaData("other", "base:allocation"), NBD_REP_ACK)
		}, NBD_EINVAL},
		{"replaced by nothing", func(c *client) {
			c.wantFinal(NBD_OPT_SET_META_CONTEXT, metaData("disk", "base:allocation"), NBD_REP_ACK)
			c.wantFinal(NBD_OPT_SET_META_CONTEXT, metaData("disk"), NBD_REP_ACK)
		}, NBD_EINVAL},
		{"replaced by a failure", func(c *client) {
			c.wantFinal(NBD_OPT_SET_META_CONTEXT, metaData("disk", "base:allocation"), NBD_REP_ACK)
			c.wantFinal(NBD_OPT_SET_META_CONTEXT, metaData("nobody", "base:allocation"), NBD_REP_ERR_UNKNOWN)
		}, NBD_EINVAL},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := dial(t, addr)
			c.wantFinal(NBD_OPT_STRUCTURED_REPLY, nil, NBD_REP_ACK)
			tc.setup(c)
			c.begin(structured, "disk")
			c.want(request{typ: NBD_CMD_BLOCK_STATUS, n: 4096}, nil, tc.want)
			c.want(request{typ: NBD_CMD_READ, n: 4096}, nil, 0)
		})
	}
}

func TestBlockStatus(t *testing.T) {
	const hole = NBD_STATE_HOLE | NBD_STATE_ZERO
	dev := newMemory(1<<20 + 1000)
	dev.data[8192] = 1
	dev.data[12288] = 1
	addr := serveDevice(t, dev)
	for _, tc := range []struct {
		name        string
		q           request
		alloc, diff []Extent
	}{
		{"runs are joined", request{n: 20480},
			[]Extent{{8192, hole}, {8192, 0}, {4096, hole}}, []Extent{{4096, 0}, {4096, 1}, {4096, 0}, {4096, 1}, {4096, 0}}},
		{"unaligned", request{off: 4000, n: 5000},
			[]Extent{{4192, hole}, {808, 0}}, []Extent{{96, 0}, {4096, 1}, {808, 0}}},
		{"one", request{flags: NBD_CMD_FLAG_REQ_ONE, n: 20480},
			[]Extent{{8192, hole}}, []Extent{{4096, 0}}},
		{"one, shorter than the extent", request{flags: NBD_CMD_FLAG_REQ_ONE, n: 100},
			[]Extent{{100, hole}}, []Extent{{100, 0}}},
		{"the last bytes", request{off: 1 << 20, n: 1000},
			[]Extent{{1000, hole}}, []Extent{{1000, 0}}},
	} {
		for _, st := range []style{structured, extended} {
			t.Run(tc.name+"/"+st.String(), func(t *testing.T) {
				c := connect(t, addr, st, "disk", "base:allocation", dirtyBitmap)
				tc.q.typ = NBD_CMD_BLOCK_STATUS
				got := c.want(tc.q, nil, 0).extents
				// Extents may go beyond what was asked for.
				for id, want := range [][]Extent{tc.alloc, tc.diff} {
					if d := cmp.Diff(want, clip(got[uint32(id)], tc.q.n)); d != "" {
						t.Errorf("context %d (-want +got)\n%s", id, d)
					}
				}
			})
		}
	}
	for name, q := range map[string]request{
		"of nothing":     {},
		"beyond the end": {off: 1 << 20, n: 1001},
		"over the wrap":  {off: 1<<64 - 1, n: 2},
		"unknown flag":   {flags: NBD_CMD_FLAG_NO_HOLE, n: 4096},
	} {
		t.Run(name, func(t *testing.T) {
			q.typ = NBD_CMD_BLOCK_STATUS
			connect(t, addr, structured, "disk", "base:allocation").want(q, nil, NBD_EINVAL)
		})
	}
}

// clip cuts extents off after n bytes.
func clip(list []Extent, n uint64) []Extent {
	var out []Extent
	for _, e := range list {
		e.N = min(e.N, int64(n))
		n -= uint64(e.N)
		out = append(out, e)
	}
	return out
}

// TestPayloadFlagOfExport checks that only the export whose contexts were
// selected is said to take lists of them.
func TestPayloadFlagOfExport(t *testing.T) {
	exports := newShelf(map[string]Device{"disk": newMemory(1 << 20), "other": newMemory(1 << 20)})
	_, addr := startServer(t, Options{Exports: exports})
	c := dial(t, addr)
	c.wantFinal(NBD_OPT_EXTENDED_HEADERS, nil, NBD_REP_ACK)
	c.wantFinal(NBD_OPT_SET_META_CONTEXT, metaData("disk", "base:allocation"), NBD_REP_ACK)
	for name, want := range map[string]uint16{"disk": NBD_FLAG_BLOCK_STATUS_PAYLOAD, "other": 0} {
		info := c.option(NBD_OPT_INFO, infoData(name))[0].data
		if got := binary.BigEndian.Uint16(info[10:]) & NBD_FLAG_BLOCK_STATUS_PAYLOAD; got != want {
			t.Errorf("flag in the INFO of %s\n got %#x\nwant %#x", name, got, want)
		}
	}
}

// TestStatusPayload asks for some of the contexts, with extended headers.
func TestStatusPayload(t *testing.T) {
	c := connect(t, serveDevice(t, newMemory(1<<20)), extended, "disk", "base:allocation", dirtyBitmap)
	if c.flags&NBD_FLAG_BLOCK_STATUS_PAYLOAD == 0 {
		t.Fatalf("transmission flags %#x lack NBD_FLAG_BLOCK_STATUS_PAYLOAD", c.flags)
	}
	payload := func(n uint64, ids ...uint32) []byte {
		p := binary.BigEndian.AppendUint64(nil, n)
		for _, id := range ids {
			p = binary.BigEndian.AppendUint32(p, id)
		}
		return p
	}
	many := make([]uint32, maxContexts+1)
	for _, tc := range []struct {
		name    string
		payload []byte
		want    []uint32 // nil: NBD_EINVAL
	}{
		{"first", payload(4096, 0), []uint32{0}},
		{"second", payload(4096, 1), []uint32{1}},
		{"both", payload(4096, 1, 0), []uint32{0, 1}},
		{"twice", payload(4096, 1, 1), nil},
		{"unknown", payload(4096, 2), nil},
		{"unknown and large", payload(4096, 1<<31), nil},
		{"none", payload(4096), nil},
		{"too many", payload(4096, many...), nil},
		{"cut", payload(4096, 0, 1)[:15], nil},
		{"short", []byte{1}, nil},
		{"long", make([]byte, 1<<20), nil},
		{"no length", payload(0, 0), nil},
		{"beyond the end", payload(1<<40, 0), nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			q := request{typ: NBD_CMD_BLOCK_STATUS, flags: NBD_CMD_FLAG_PAYLOAD_LEN, n: uint64(len(tc.payload))}
			// The client checks extents against q.n: let it be one.
			q.flags |= NBD_CMD_FLAG_REQ_ONE
			if tc.want == nil {
				c.want(q, tc.payload, NBD_EINVAL)
				c.want(request{typ: NBD_CMD_READ, n: 512}, nil, 0)
				return
			}
			q.flags &^= NBD_CMD_FLAG_REQ_ONE
			var got []uint32
			for id := range c.want(q, tc.payload, 0).extents {
				got = append(got, id)
			}
			if slices.Sort(got); !slices.Equal(got, tc.want) {
				t.Errorf("contexts in the reply\n got %v\nwant %v", got, tc.want)
			}
		})
	}
}

// long is a Device whose status is what the test says.
type long struct {
	sized
	extents []Extent
	err     error
}

func (l *long) Status(string, int64, int64) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		for _, e := range l.extents {
			if !yield(e, nil) {
				return
			}
		}
		if l.err != nil {
			yield(Extent{}, l.err)
		}
	}
}

// TestLongExtents checks extents of more than 32 bits, and that the reply is
// bounded.
func TestLongExtents(t *testing.T) {
	dev := &long{sized: sized{newMemory(0), 1 << 50, false}}
	addr := serveDevice(t, dev)
	narrow := connect(t, addr, structured, "disk", "base:allocation")
	wide := connect(t, addr, extended, "disk", "base:allocation")
	ask := func(c *client, n uint64) []Extent {
		t.Helper()
		return c.want(request{typ: NBD_CMD_BLOCK_STATUS, n: n}, nil, 0).extents[0]
	}

	dev.extents = []Extent{{1 << 49, 3}, {1 << 49, 0}}
	if got, want := ask(narrow, 1<<20), []Extent{{maxExtent32, 3}}; !slices.Equal(got, want) {
		t.Errorf("structured\n got %v\nwant %v", got, want)
	}
	if got, want := ask(wide, 1<<50), dev.extents; !slices.Equal(got, want) {
		t.Errorf("extended\n got %v\nwant %v", got, want)
	}

	dev.extents = nil
	for i := range uint32(1 << 18) {
		dev.extents = append(dev.extents, Extent{4096, i & 1})
	}
	for _, c := range []*client{narrow, wide} {
		got := ask(c, 1<<30)
		if len(got) < 4096 || len(got) > (statusSize+pageSize)/8 || !slices.Equal(got, dev.extents[:len(got)]) {
			t.Errorf("style %v: %d of %d extents came", c.style, len(got), len(dev.extents))
		}
	}

	dev.extents, dev.err = []Extent{{4096, 0}}, syscall.EIO
	for _, c := range []*client{narrow, wide} {
		c.want(request{typ: NBD_CMD_BLOCK_STATUS, n: 1 << 20}, nil, NBD_EIO)
	}
	dev.extents, dev.err = nil, nil
	narrow.want(request{typ: NBD_CMD_BLOCK_STATUS, n: 1 << 20}, nil, NBD_EIO)
}
