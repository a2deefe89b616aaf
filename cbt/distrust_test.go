package cbt

import (
	"bytes"
	"testing"

	"github.com/google/uuid"
)

// TestDistrust loses the memory of a map, which is zeroes afterwards. Nobody is told that
// nothing changed: neither who asks afterwards, nor who had asked. A new generation can be
// trusted again.
func TestDistrust(t *testing.T) {
	mem := newHeap(1024 * nodeSize)
	m, err := New(mem, 1<<30, block, uuid.New(), 0) // its books are not right afterwards
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Close)
	m.Mark(0, 1)
	f := freeze(t, m)
	m.Mark(block, 1)
	v := m.View()
	m.Distrust()
	clear(mem.Bytes()[:mem.Len()])
	if !m.Lost() {
		t.Error("the map is not lost")
	}
	for _, v := range []*View{&f.View, v, m.View()} {
		wantLost(t, "view", v)
		p := make([]byte, 100)
		if n := v.ReadMap(p, 7); n != len(p) || bytes.IndexByte(p, 0) >= 0 || !v.Gone() {
			t.Errorf("the map of a lost view is %x, gone %t", p[:n], v.Gone())
		}
	}
	m.Mark(3*block, 1) // goes on without a word
	if err := m.Resize(1<<30 - 512); err != nil || !m.Lost() {
		t.Errorf("after Resize: lost %t, error %v", m.Lost(), err)
	}
	f.Release()
	v.Release()
	m.Reset(uuid.New())
	if m.Lost() {
		t.Error("the new generation is lost")
	}
	m.Mark(5*block, 1)
	now := m.View()
	wantChanged(t, now, now.Number(), [2]int64{5 * block, block})
}
