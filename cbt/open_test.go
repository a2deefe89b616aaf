package cbt

import (
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/google/uuid"
)

var update = flag.Bool("update", false, "write testdata/map.golden")

// goldenMap is a small map with one node of each kind: two frozen maps, the
// older of which an image write went into, and a live one whose base moved.
func goldenMap(t *testing.T) (*Map, *heap) {
	mem := newHeap(1 << 20)
	m, err := New(mem, 3*leafSpan+512, block, uuid.MustParse("6ba7b810-9dad-11d1-80b4-00c04fd430c8"), 6)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeMap(t, m) })
	m.limit = 2
	m.Mark(0, 3*block)
	f := freeze(t, m)
	m.Mark(2*block, 1)
	freeze(t, m)
	f.Mark(9*block, 1, 7)
	m.Mark(leafSpan, 10*block)
	return m, mem
}

// words lists the words of mem that are not zero, one a line. It is for a
// little-endian machine.
func wordsOf(mem *heap) string {
	var s strings.Builder
	for off := int64(0); off < mem.n; off += 8 {
		if w := binary.LittleEndian.Uint64(mem.bytes[off:]); w != 0 {
			fmt.Fprintf(&s, "%6d %016x\n", off, w)
		}
	}
	return s.String()
}

// The words in testdata/map.golden are the format. If this test fails, a map
// that another version left behind can no longer be read: raise the version
// instead of changing the words.
func TestGolden(t *testing.T) {
	const file = "testdata/map.golden"
	_, mem := goldenMap(t)
	got := wordsOf(mem)
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o666); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("words\n got\n%s\nwant\n%s", got, want)
	}
}

// TestOpenGolden opens what another process left in testdata/map.golden.
func TestOpenGolden(t *testing.T) {
	text, err := os.ReadFile("testdata/map.golden")
	if err != nil {
		t.Fatal(err)
	}
	mem := newHeap(1 << 20)
	mem.n = 16 * nodeSize
	for line := range strings.Lines(string(text)) {
		var off int64
		var w uint64
		if _, err := fmt.Sscanf(line, "%d %x", &off, &w); err != nil {
			t.Fatal(err)
		}
		binary.LittleEndian.PutUint64(mem.bytes[off:], w)
	}
	m, frozen := openTestMap(t, mem)
	if len(frozen) != 2 || frozen[0].Number() != 7 || frozen[1].Number() != 8 {
		t.Fatalf("frozen maps %v, want 7 and 8", frozen)
	}
	wantChanged(t, &frozen[0].View, 6, [2]int64{0, 3 * block}, [2]int64{9 * block, block})
	wantChanged(t, &frozen[1].View, 6, [2]int64{0, 3 * block})
	wantChanged(t, &frozen[1].View, 7, [2]int64{2 * block, block})
	v := m.View()
	defer v.Release()
	if v.Base() != 7 || v.Number() != 8 {
		t.Errorf("base %d, number %d, want 7, 8", v.Base(), v.Number())
	}
	wantChanged(t, v, 7, [2]int64{2 * block, block}, [2]int64{leafSpan, 10 * block})
}

// TestOpenRefuses damages each part of a map that can be told from a good one.
func TestOpenRefuses(t *testing.T) {
	m, mem := goldenMap(t)
	record := m.live.Load().record
	if record == m.tables.data() {
		t.Fatal("no record before the live map's")
	}
	leaf := m.live.Load().leaf(0)
	root := link(m.live.Load().root.Load())
	put := func(off int64, v uint64) func(b []byte) {
		return func(b []byte) { binary.NativeEndian.PutUint64(b[off:], v) }
	}
	head := func(l link, i nodeInfo) func(b []byte) {
		i.level, i.epoch = l.level(), l.epoch()
		return func(b []byte) { i.encode(b[l.node().offset():]) }
	}
	for _, tc := range []struct {
		name   string
		damage func(b []byte)
		want   error
	}{
		{"all zeroes", func(b []byte) { clear(b) }, ErrNoMap},
		{"another file", func(b []byte) { copy(b, "\x7fELF....") }, ErrNoMap},
		{"newer version", func(b []byte) { b[headerVersion]++ }, ErrVersion},
		{"tracking block size", func(b []byte) { b[headerShift]++ }, ErrDamaged},
		{"impossible tracking block size", func(b []byte) { put(0, encodeHeader(b, maxShift+1))(b) }, ErrDamaged},
		{"commit of the record before", put(headerLive, m.load(headerLive)-1), ErrDamaged},
		{"commit of the record after", put(headerLive, m.load(headerLive)+1), ErrDamaged},
		{"commit of a record far away", put(headerLive, 1<<32), ErrDamaged},
		{"no table", put(headerTable, 0), ErrDamaged},
		{"table out of memory", put(headerTable, uint64(newLink(maxNodes-1, tableLevel, 0))), ErrDamaged},
		{"leaf as table", put(headerTable, uint64(leaf)), ErrDamaged},
		{"table linked to itself", put(m.tables.node().offset()+nodeNext, uint64(m.tables)), ErrDamaged},
		{"state", put(record+recordState, 3), ErrDamaged},
		{"number", put(record+recordNumber, 99), ErrDamaged},
		{"size", put(record+recordBytes, 513), ErrDamaged},
		{"negative size", put(record+recordBytes, 1<<63), ErrDamaged},
		{"generation", func(b []byte) { b[record+recordGeneration]++ }, ErrDamaged},
		{"numbers beyond a byte", func(b []byte) { history{number: 1000, base: 1}.encode(b[record:]) }, ErrDamaged},
		{"leaf as root", put(record+recordRoot, uint64(newLink(leaf.node(), 1, leaf.epoch()))), ErrDamaged},
		{"header as root", put(record+recordRoot, uint64(newLink(0, 1, 1))), ErrDamaged},
		{"table as root", put(record+recordRoot, uint64(m.tables)), ErrDamaged},
		{"root of another epoch", put(record+recordRoot, uint64(newLink(root.node(), root.level(), 1))), ErrDamaged},
		{"index linked to itself", put(root.data(), uint64(root)), ErrDamaged},
		{"leaf in another place", put(root.data()+16, uint64(leaf)), ErrDamaged},
		{"base of a leaf", put(leaf.node().offset()+nodeBase, 0), ErrDamaged},
		{"base of the future", head(leaf, nodeInfo{base: 7, number: 8}), ErrDamaged},
		{"leaf of the future", head(leaf, nodeInfo{base: 6, number: 9}), ErrDamaged},
		{"leaf without a number", head(leaf, nodeInfo{base: 6, number: 6}), ErrDamaged},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := copyHeap(mem)
			tc.damage(c.bytes)
			before := string(c.bytes)
			if _, _, err := Open(c); !errors.Is(err, tc.want) {
				t.Errorf("Open: %v, want %v", err, tc.want)
			}
			if string(c.bytes) != before {
				t.Error("Open changed what it refused")
			}
		})
	}
	short := copyHeap(mem)
	for short.n -= nodeSize; short.n >= 0; short.n -= nodeSize {
		if _, _, err := Open(short); err == nil && short.n < leaf.node().offset() {
			t.Errorf("opened %d bytes", short.n)
		}
	}
}

// TestOpenRefusesLongBytes opens a map in which a leaf stands for numbers that
// a byte cannot count.
func TestOpenRefusesLongBytes(t *testing.T) {
	mem := newHeap(1 << 20)
	m, err := New(mem, leafSpan, block, uuid.New(), 1000)
	if err != nil {
		t.Fatal(err)
	}
	m.Close()
	m.Mark(0, 1)
	leaf := m.live.Load().leaf(0)
	nodeInfo{epoch: leaf.epoch(), base: 700, number: 1001}.encode(m.header(leaf.node()))
	if _, _, err := Open(mem); !errors.Is(err, ErrDamaged) {
		t.Errorf("Open: %v, want %v", err, ErrDamaged)
	}
}

// FuzzOpen opens maps with damaged words. What is opened can be used: nothing
// panics or hangs, whatever it says.
func FuzzOpen(f *testing.F) {
	f.Add(uint16(3), uint64(1), uint16(4000), uint64(1<<63))
	f.Fuzz(func(t *testing.T, at1 uint16, xor1 uint64, at2 uint16, xor2 uint64) {
		_, mem := goldenMap(t)
		c := copyHeap(mem)
		damage(c, int64(at1), xor1)
		damage(c, int64(at2), xor2)
		use(c)
	})
}

// TestOpenDamaged is FuzzOpen with random damage.
func TestOpenDamaged(t *testing.T) {
	rng := random(t)
	_, mem := goldenMap(t)
	opened := 0
	const rounds = 1000
	for range rounds {
		c := copyHeap(mem)
		for range rng.IntN(3) + 1 {
			// Mostly where links and headers are.
			off := rng.Int64N(c.n / 8)
			if rng.IntN(2) == 0 {
				off = rng.Int64N(c.n/nodeSize)*nodeSize/8 + rng.Int64N(16)
			}
			damage(c, off, 1<<rng.IntN(64))
		}
		if use(c) {
			opened++
		}
	}
	if opened == 0 || opened == rounds {
		t.Errorf("opened %d of %d damaged maps", opened, rounds)
	}
}

// damage changes a word of mem.
func damage(mem *heap, word int64, xor uint64) {
	off := word * 8 % mem.n
	binary.NativeEndian.PutUint64(mem.bytes[off:], binary.NativeEndian.Uint64(mem.bytes[off:])^xor)
}

// use opens what is in mem and does a bit of everything with it. It returns
// false if it could not be opened.
func use(mem *heap) bool {
	m, frozen, err := Open(mem)
	if err != nil {
		return false
	}
	defer m.Close()
	for _, f := range frozen {
		f.Mark(0, 20*block, f.Number())
		read(&f.View)
	}
	m.Mark(0, 1)
	m.Mark(leafSpan, leafSpan)
	read(m.View())
	for _, f := range frozen {
		f.Release()
	}
	if m.Prepare() == nil {
		if f, err := m.Freeze(); err == nil {
			read(&f.View)
		}
	}
	return true
}

func read(v *View) {
	v.ReadMap(make([]byte, 5000), v.Blocks()-5000)
	v.ReadMap(make([]byte, 5000), 0)
	if runs, ok := v.Since(v.Base()); ok {
		for range runs {
		}
	}
}
