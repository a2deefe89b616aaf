package store

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"path/filepath"
	"testing"
	"time"
)

func TestSlotsKeepTheirContent(t *testing.T) {
	part, err := OpenFile(filepath.Join(t.TempDir(), "s"), 64<<20, false)
	if err != nil {
		t.Fatal(err)
	}
	mem, err := OpenMem(4 << 20)
	if err != nil {
		t.Fatal(err)
	}
	p := NewPool(mem, part)
	t.Cleanup(func() {
		if err := p.Check(); err != nil {
			t.Error(err)
		}
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	type use struct {
		s Slot
		m uint16
	}
	var all []use
	b := make([]byte, SlotSize)
	start := time.Now()
	for time.Since(start) < 3*time.Second {
		n := 1 + rand.IntN(16)
		dst, masks := make([]Slot, n), make([]uint16, n)
		for i := range masks {
			switch rand.IntN(3) {
			case 0:
				masks[i] = AllBlocks
			case 1:
				masks[i] = 1 << rand.IntN(16)
			default:
				masks[i] = uint16(rand.Uint32())
			}
		}
		n, err := p.Alloc(dst, masks)
		if err != nil && !errors.Is(err, ErrFull) {
			t.Fatal(err)
		}
		for i, s := range dst[:n] {
			for k := range 16 {
				if masks[i]>>k&1 != 0 {
					if err := p.WriteAt(s, bytes.Repeat([]byte{byte(s)}, 4096), int64(k*4096)); err != nil {
						t.Fatal(err)
					}
				}
			}
			all = append(all, use{s, masks[i]})
		}
		for len(all) > 1000 || err != nil && len(all) > 300 {
			k := rand.IntN(len(all))
			u := all[k]
			for k := range 16 {
				if u.m>>k&1 != 0 {
					if err := p.ReadAt(u.s, b[:4096], int64(k*4096)); err != nil || b[0] != byte(u.s) || b[4095] != byte(u.s) {
						t.Fatal(err, u.s, k, b[0])
					}
				}
			}
			p.Free(u.s, u.m)
			all[k] = all[len(all)-1]
			all = all[:len(all)-1]
		}
		if err := p.Check(); err != nil {
			t.Fatal(err)
		}
	}
	t.Log(p.Parts())
	for _, u := range all {
		p.Free(u.s, u.m)
	}
	if err := p.Discard(); err != nil {
		t.Fatal(err)
	}
	size, used, free := p.Space()
	t.Log(size, used, free)
}
