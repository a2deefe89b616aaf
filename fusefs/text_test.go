package fusefs

import (
	"bytes"
	"errors"
	"flag"
	"math/rand/v2"
	"syscall"
	"testing"
	"time"
)

var seed = flag.Uint64("seed", uint64(time.Now().UnixNano()), "seed of the random tests")

// TestTextAgainstBytes writes pieces of random lengths to a text and to plain
// bytes, and reads random ranges of both.
func TestTextAgainstBytes(t *testing.T) {
	t.Logf("repeat with -seed=%d", *seed)
	rng := rand.New(rand.NewPCG(*seed, 0))
	for range 20 {
		var b budget
		text, model := &text{budget: &b}, []byte{}
		for range rng.IntN(40) {
			p := make([]byte, rng.IntN(10000))
			for i := range p {
				p[i] = byte(rng.Uint32())
			}
			if err := text.write(p); err != nil {
				t.Fatal(err)
			}
			model = append(model, p...)
		}
		text.trim()
		if text.size != int64(len(model)) || b.used.Load() != text.size {
			t.Fatalf("size %d, in budget %d, want both %d", text.size, b.used.Load(), len(model))
		}
		for range 100 {
			off := rng.IntN(len(model) + 10)
			p := make([]byte, rng.IntN(100000))
			want := model[min(off, len(model)):min(off+len(p), len(model))]
			if n, _ := text.readAt(p, int64(off)); !bytes.Equal(p[:n], want) {
				t.Fatalf("read of %d at %d of %d: %d bytes, want %d, or they differ", len(p), off, len(model), n, len(want))
			}
		}
		text.free()
		if used := b.used.Load(); used != 0 {
			t.Fatalf("after free the budget holds %d bytes", used)
		}
	}
}

// TestTextLimit fills the budget: the text that does not fit is refused, and
// what it had is given back.
func TestTextLimit(t *testing.T) {
	var b budget
	b.used.Store(contentLimit - 2*textChunk)
	text := &text{budget: &b}
	err := text.write(make([]byte, 3*textChunk))
	if !errors.Is(err, syscall.ENOMEM) {
		t.Errorf("write beyond the limit\n got %v\nwant %v", err, syscall.ENOMEM)
	}
	text.free()
	if used := b.used.Load(); used != contentLimit-2*textChunk {
		t.Errorf("budget after free\n got %d\nwant %d", used, contentLimit-2*textChunk)
	}
}
