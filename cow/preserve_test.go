package cow

import "testing"

// TestOverflowOfOneChunkOfAWrite has a write that finds no room for its first chunk,
// which only the newer snapshot needs, and room for its second, which both need. Only
// the newer one may break.
func TestOverflowOfOneChunkOfAWrite(t *testing.T) {
	const block = int64(blockSize)
	r := newRig(t, 1, 8<<20, 1<<20)
	d := r.devs[0]
	put(t, d, 1, 0, d.Size())
	older := r.take("older")
	put(t, d, 2, 0, chunkSize) // the older one has the first chunk
	newer := r.take("newer")
	const kept = 256 << 10 // of the store, for folding
	at := int64(2 * chunkSize)
	for _, _, free := r.pool.Space(); free > kept+5*block; _, _, free = r.pool.Space() {
		put(t, d, 3, at, block)
		at += block
	}
	if got := states(older, newer); got != "ok ok" {
		t.Fatalf("states before: got %s, want ok ok", got)
	}
	put(t, d, 4, 0, chunkSize+block)
	if got, want := states(older, newer), "ok overflowed"; got != want {
		t.Errorf("states: got %s, want %s", got, want)
	}
	want(t, image(t, older, "d0"), 1, 0, d.Size())
}
