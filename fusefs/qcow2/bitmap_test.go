package qcow2

import (
	"testing"

	"pgregory.net/rapid"
)

// TestBitmap asks a bitmap and a slice of bools the same.
func TestBitmap(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.Int64Range(1, 5).Draw(t, "words") * 64
		b, model := newBitmap(n), make([]bool, n)
		for range rapid.IntRange(1, 6).Draw(t, "ranges") {
			from := rapid.Int64Range(0, n-1).Draw(t, "from")
			to := rapid.Int64Range(from+1, n).Draw(t, "to")
			b.add(from, to)
			for i := from; i < to; i++ {
				model[i] = true
			}
		}
		below := int64(0)
		for i, want := range model {
			i := int64(i)
			if got := b.has(i); got != want {
				t.Errorf("has(%d)\n got %v\nwant %v", i, got, want)
			}
			if got := b.below(i); got != below {
				t.Errorf("below(%d)\n got %d\nwant %d", i, got, below)
			}
			gap := i
			for gap < n && model[gap] {
				gap++
			}
			if got := b.gap(i); got != gap {
				t.Errorf("gap(%d)\n got %d\nwant %d", i, got, gap)
			}
			if !want {
				continue
			}
			if got := b.nth(below); got != i {
				t.Errorf("nth(%d)\n got %d\nwant %d", below, got, i)
			}
			below++
		}
	})
}

// TestNilBitmap asks one that was never made.
func TestNilBitmap(t *testing.T) {
	var b bitmap
	if b.has(511) || b.below(511) != 0 {
		t.Errorf("nil has 511: %v, %d below it\nwant false, 0", b.has(511), b.below(511))
	}
}
