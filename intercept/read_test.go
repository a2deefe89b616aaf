package intercept

import (
	"bytes"
	"slices"
	"syscall"
	"testing"
)

// TestHoles checks what of a read comes as data and what as holes.
func TestHoles(t *testing.T) {
	const k = 64 << 10
	const D, H = NBD_REPLY_TYPE_OFFSET_DATA, NBD_REPLY_TYPE_OFFSET_HOLE
	dev := newMemory(4 << 20)
	for _, block := range []int{1, 2, 5, 32} { // the rest is zero
		dev.data[block*k+100] = 1
	}
	for _, tc := range []struct {
		name   string
		off, n uint64
		flags  uint16
		want   []uint16
	}{
		{"data", k, 2 * k, 0, []uint16{D}},
		{"hole", 3 * k, 2 * k, 0, []uint16{H}},
		{"hole, data, hole, data", 0, 6 * k, 0, []uint16{H, D, H, D}},
		{"data, hole", 2 * k, 2 * k, 0, []uint16{D, H}},
		{"zeroes shorter than a hole", 3 * k, k - 1, 0, []uint16{D}},
		{"zeroes not aligned", 3*k + 512, k, 0, []uint16{D}},
		{"ends that are no whole blocks", 3*k - 512, 2*k + 1024, 0, []uint16{D, H, D}},
		{"small read of zeroes", 3 * k, 4096, 0, []uint16{D}},
		{"do not fragment", 0, 6 * k, NBD_CMD_FLAG_DF, []uint16{D}},
		{"several pieces", 0, 4 << 20, 0, nil}, // any order
	} {
		for _, st := range []style{structured, extended} {
			for _, d := range []Device{plain{dev}, &tryMemory{memory: dev}} {
				t.Run(tc.name+"/"+st.String(), func(t *testing.T) {
					c := connect(t, serveDevice(t, d), st, "disk")
					x := c.want(request{typ: NBD_CMD_READ, flags: tc.flags, off: tc.off, n: tc.n}, nil, 0)
					if tc.want != nil && !slices.Equal(x.chunks, tc.want) {
						t.Errorf("chunks\n got %v\nwant %v", x.chunks, tc.want)
					}
					if !bytes.Equal(x.data, dev.data[tc.off:tc.off+tc.n]) {
						t.Error("data differs")
					}
				})
			}
		}
	}
}

// TestFailedPiece reads and writes several pieces of which one fails. With
// chunks the client learns which; without, one error counts for all.
func TestFailedPiece(t *testing.T) {
	const bad = 2 << 20
	dev := newMemory(8 << 20)
	dev.before = func(op string, off, n int64) error {
		if off <= bad && bad < off+n {
			return syscall.EIO
		}
		return nil
	}
	for _, st := range styles {
		t.Run(st.String(), func(t *testing.T) {
			c := connect(t, serveDevice(t, dev), st, "disk")
			x := c.want(request{typ: NBD_CMD_READ, n: 8 << 20}, nil, NBD_EIO)
			if st != simple && (x.errOff > bad || x.errOff+pieceSize <= bad) {
				t.Errorf("offset of the error\n got %d\nwant the piece that holds %d", x.errOff, bad)
			}
			if st != simple && x.covered != 8<<20-pieceSize {
				t.Errorf("bytes that came beside the failed piece\n got %d\nwant %d", x.covered, 8<<20-pieceSize)
			}
			c.want(request{typ: NBD_CMD_WRITE, n: 8 << 20}, make([]byte, 8<<20), NBD_EIO)
			c.want(request{typ: NBD_CMD_READ, n: 512}, nil, 0)
			c.disconnect()
		})
	}
}

// TestUnsplitWithoutMemory reads what must come in one, from a server that has
// no more than the floors: simple replies are streamed, DF is refused.
func TestUnsplitWithoutMemory(t *testing.T) {
	dev := newMemory(8 << 20)
	for i := range dev.data {
		dev.data[i] = byte(i >> 9)
	}
	exports := newShelf(map[string]Device{"disk": dev})
	_, addr := startServer(t, Options{Exports: exports, MemoryBudget: 1})

	c := connect(t, addr, simple, "disk")
	x := c.want(request{typ: NBD_CMD_READ, off: 1000, n: 5 << 20}, nil, 0)
	if !bytes.Equal(x.data, dev.data[1000:][:5<<20]) {
		t.Error("streamed data differs")
	}
	c.want(request{typ: NBD_CMD_READ, n: 512}, nil, 0)

	d := connect(t, addr, structured, "disk")
	d.want(request{typ: NBD_CMD_READ, flags: NBD_CMD_FLAG_DF, n: 5 << 20}, nil, NBD_EOVERFLOW)
	d.want(request{typ: NBD_CMD_READ, flags: NBD_CMD_FLAG_DF, n: floorSize}, nil, 0)
}

// TestStreamFails breaks a streamed read at its first byte, which can still be
// answered, and in the middle, which must end the connection.
func TestStreamFails(t *testing.T) {
	for _, tc := range []struct {
		name string
		bad  int64
		ends bool
	}{{"first piece", 0, false}, {"later piece", 1 << 20, true}} {
		t.Run(tc.name, func(t *testing.T) {
			dev := newMemory(8 << 20)
			dev.before = func(op string, off, n int64) error {
				if off <= tc.bad && tc.bad < off+n {
					return syscall.EIO
				}
				return nil
			}
			exports := newShelf(map[string]Device{"disk": dev})
			_, addr := startServer(t, Options{Exports: exports, MemoryBudget: 1})
			c := connect(t, addr, simple, "disk")
			x := c.do(request{typ: NBD_CMD_READ, n: 4 << 20}, nil)
			if ended := x.err != nil; ended != tc.ends || !ended && x.errno != NBD_EIO {
				t.Errorf("read\n got errno %d, connection %v\nwant end of connection: %t", x.errno, x.err, tc.ends)
			}
		})
	}
}
