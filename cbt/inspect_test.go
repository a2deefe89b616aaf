package cbt

import (
	"bytes"
	"maps"
	"slices"
	"testing"
)

// TestInspect damages a map in many ways and compares what Inspect says with what Open
// does, to a copy of it.
func TestInspect(t *testing.T) {
	_, golden := goldenMap(t)
	rng := random(t)
	sound := 0
	for n := range 4000 {
		mem := copyHeap(golden)
		for range n % 3 {
			var full []int64
			for off := int64(0); off < mem.n; off += 8 {
				if !bytes.Equal(mem.bytes[off:off+8], make([]byte, 8)) {
					full = append(full, off)
				}
			}
			damage(mem, full[rng.IntN(len(full))]/8, 1<<rng.IntN(64))
		}
		before := bytes.Clone(mem.bytes[:mem.n])
		rep, ierr := Inspect(bytes.NewReader(mem.bytes[:mem.n]), mem.n)
		if !bytes.Equal(before, mem.bytes[:mem.n]) {
			t.Fatal("Inspect has changed it")
		}
		m, frozen, err := Open(mem)
		if (err == nil) != (ierr == nil) {
			t.Fatalf("input %d: Inspect says %v, Open %v", n, ierr, err)
		}
		if err != nil {
			continue
		}
		sound++
		var numbers []uint64
		for _, f := range frozen {
			numbers = append(numbers, f.Number())
		}
		got := slices.Sorted(maps.Keys(rep.Frozen))
		if !slices.Equal(got, slices.Compact(numbers)) || rep.Number != m.Number() || rep.Base != m.Base() ||
			rep.Generation != m.Generation() || rep.Size != m.Size() || rep.Lost != m.Lost() {
			t.Errorf("input %d: got %+v, frozen %v\nwant number %d, base %d, frozen %v", n, rep, got, m.Number(), m.Base(), numbers)
		}
		m.Close()
	}
	t.Logf("%d of 4000 maps were sound", sound)
}
