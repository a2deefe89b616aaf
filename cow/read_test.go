package cow

import (
	"sync"
	"testing"
)

// TestLookWhileFolding looks for an image's data again and again while it moves
// from one layer to another. The origin has none of it any more, so that what a
// look misses would be a hole, and never be copied.
func TestLookWhileFolding(t *testing.T) {
	const n = 2048 // chunks
	for range 6 {
		r := newRig(t, 1, n*chunkSize, 64<<20)
		d := r.devs[0]
		first := func(v byte) { // the first block of every chunk
			for c := range chunkNo(n) {
				put(t, d, v, c.off(), blockSize)
			}
		}
		first(1)
		old := image(t, r.take("old"), "d0")
		between := r.take("between")
		first(2)
		r.destroy(r.take("new")) // leaves a head
		if err := d.Trim(0, d.Size(), false); err != nil {
			t.Fatal(err)
		}

		var scanners sync.WaitGroup
		folded := make(chan struct{})
		for range 4 {
			scanners.Go(func() {
				for done := false; !done; {
					select {
					case <-folded:
						done = true // and look once more
					default:
					}
					data, err := old.scan()
					if err != nil || len(data) != n {
						t.Errorf("got %d runs of data and %v, want %d", len(data), err, n)
						return
					}
				}
			})
		}
		r.destroy(between)
		close(folded)
		scanners.Wait()
		if t.Failed() {
			return
		}
	}
}
