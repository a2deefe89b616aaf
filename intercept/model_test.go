package intercept

import (
	"bytes"
	"flag"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"
)

var seed = flag.Uint64("seed", 0, "of the random tests; 0: from the time")

// random returns a source whose seed is logged.
func random(t testing.TB) *rand.Rand {
	s := *seed
	if s == 0 {
		s = uint64(time.Now().UnixNano())
	}
	t.Logf("repeat with -seed=%d", s)
	return rand.New(rand.NewPCG(s, 1))
}

// TestModel does random requests on several connections at once, each on its
// own part of the export, with many of them in flight, and compares every byte
// that is read with a model. It runs in all styles, over devices with and
// without Try methods, with a comfortable budget and with the floors alone.
func TestModel(t *testing.T) {
	const part = 3 << 20
	rounds := 8
	if raceEnabled {
		rounds = 4
	}
	for _, budget := range []int64{128 << 20, 1} {
		for _, try := range []bool{false, true} {
			for _, st := range styles {
				t.Run(fmt.Sprintf("budget %d/try %t/%v", budget, try, st), func(t *testing.T) {
					rng := random(t)
					var dev Device = newMemory(3 * part)
					if try {
						dev = &tryMemory{memory: dev.(*memory)}
					}
					_, addr := startServer(t, Options{Exports: newShelf(map[string]Device{"disk": dev}), MemoryBudget: budget})
					var wg sync.WaitGroup
					for i := range int64(3) {
						m := &model{
							c: connect(t, addr, st, "disk"), base: i * part, data: make([]byte, part),
							rng: rand.New(rand.NewPCG(rng.Uint64(), 1)),
						}
						wg.Go(func() { m.run(t, rounds) })
					}
					wg.Wait()
				})
			}
		}
	}
}

// model is what a client knows of its part of an export.
type model struct {
	c    *client
	base int64
	data []byte
	rng  *rand.Rand
}

// run does n rounds. A round is several requests in flight at once whose ranges
// do not overlap, so that their order does not matter.
func (m *model) run(t *testing.T, n int) {
	for i := range n {
		var flight []*exchange
		for off := m.rng.Int64N(1 << 18); ; {
			size := m.size()
			if off+size > int64(len(m.data)) {
				break
			}
			flight = append(flight, m.start(off, size))
			off += size + m.rng.Int64N(1<<18)
		}
		for _, x := range flight {
			<-x.done
			off := int64(x.q.off) - m.base
			if x.err != nil || x.errno != 0 {
				t.Errorf("round %d: request %+v: %v, errno %d %s", i, x.q, x.err, x.errno, x.text)
				return
			}
			if want := m.data[off:][:x.q.n]; x.q.typ == NBD_CMD_READ && !bytes.Equal(x.data, want) {
				at := 0
				for x.data[at] == want[at] {
					at++
				}
				t.Errorf("round %d: read of %d at %d differs from the model at byte %d: got %#x, want %#x", i, x.q.n, x.q.off, at, x.data[at], want[at])
				return
			}
		}
	}
	m.c.disconnect()
}

// size is mostly small, often a block, sometimes more than a piece.
func (m *model) size() int64 {
	switch m.rng.IntN(8) {
	case 0:
		return 1 + m.rng.Int64N(2*pieceSize)
	case 1, 2:
		return 1 + m.rng.Int64N(200<<10)
	case 3:
		return 1 + m.rng.Int64N(600)
	}
	return 4096
}

// start sends a request and does the same to the model.
func (m *model) start(off, n int64) *exchange {
	q := request{off: uint64(m.base + off), n: uint64(n)}
	if m.rng.IntN(10) == 0 {
		q.flags = NBD_CMD_FLAG_FUA
	}
	part := m.data[off : off+n]
	switch m.rng.IntN(8) {
	case 0:
		q.typ = NBD_CMD_WRITE_ZEROES
		clear(part)
	case 1, 2, 3:
		q.typ = NBD_CMD_WRITE
		p := m.payload(n)
		copy(part, p)
		return m.c.start(q, p)
	case 4:
		q.typ = NBD_CMD_READ
		if m.c.style != simple && n <= floorSize {
			q.flags = NBD_CMD_FLAG_DF
		}
	default:
		q.typ = NBD_CMD_READ
	}
	return m.c.start(q, nil)
}

// payload has zeroes of a hole's size in it now and then.
func (m *model) payload(n int64) []byte {
	p := make([]byte, n)
	for off := int64(0); off < n; {
		size := min(1+m.rng.Int64N(256<<10), n-off)
		if b := byte(m.rng.IntN(3)); b > 0 {
			copy(p[off:], bytes.Repeat([]byte{b, byte(m.rng.Uint32())}, int(size/2+1))[:size])
		}
		off += size
	}
	return p
}
