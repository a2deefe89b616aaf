package store

import (
	"testing"
)

// openMem returns a part in memory. Whoever puts it in a pool closes it there.
func openMem(t testing.TB, limit int64) Part {
	t.Helper()
	part, err := OpenMem(limit)
	if err != nil {
		t.Fatalf("OpenMem(%d): %v", limit, err)
	}
	return part
}

// openFile returns a part in the file path. Whoever puts it in a pool closes it
// there.
func openFile(t testing.TB, path string, limit int64) Part {
	t.Helper()
	part, err := OpenFile(path, limit, false)
	if err != nil {
		t.Fatalf("OpenFile(%s, %d): %v", path, limit, err)
	}
	return part
}

// openPool returns a pool of parts that is checked and closed when the test
// ends.
func openPool(t testing.TB, parts ...Part) *Pool {
	t.Helper()
	p := NewPool(parts...)
	t.Cleanup(func() {
		if err := p.Check(); err != nil {
			t.Errorf("pool is inconsistent at the end of the test: %v", err)
		}
		if err := p.Close(); err != nil {
			t.Errorf("close pool: %v", err)
		}
	})
	return p
}

// allocOne returns one slot for mask.
func allocOne(t testing.TB, p *Pool, mask uint16) Slot {
	t.Helper()
	dst := []Slot{NoSlot}
	if _, err := p.Alloc(dst, []uint16{mask}); err != nil {
		t.Fatalf("Alloc of blocks %016b: %v", mask, err)
	}
	return dst[0]
}
