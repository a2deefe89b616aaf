// NBD clients that do not keep to the rules.

package test

import (
	"encoding/binary"
	"errors"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"syscall"
	"testing"
)

// A request that cannot be done is answered with its error, and the connection
// goes on.
func TestBadRequestsAreAnswered(t *testing.T) {
	needRoot(t)
	const size = 4 * miB
	d, _ := serveOrigin(t, size)
	mkdir(t, d.snapshot("s1"))
	for _, tc := range []struct {
		name           string
		export         string
		command, flags uint16
		off            int64
		n              uint32
		payload        []byte
		want           error
	}{
		{"read over the end", "vda", NBD_CMD_READ, 0, size - 512, 1024, nil, syscall.EINVAL},
		{"read beyond the end", "vda", NBD_CMD_READ, 0, size, 512, nil, syscall.EINVAL},
		{"read at a negative offset", "vda", NBD_CMD_READ, 0, -512, 512, nil, syscall.EINVAL},
		{"read at the highest offset", "vda", NBD_CMD_READ, 0, math.MaxInt64, 512, nil, syscall.EINVAL},
		{"read of 4 GiB", "vda", NBD_CMD_READ, 0, 0, math.MaxUint32, nil, syscall.EINVAL},
		{"read of nothing", "vda", NBD_CMD_READ, 0, 0, 0, nil, nil},
		{"write over the end", "vda", NBD_CMD_WRITE, 0, size - 512, 1024, make([]byte, 1024), syscall.ENOSPC},
		{"write beyond the end", "vda", NBD_CMD_WRITE, 0, size + 4096, 512, make([]byte, 512), syscall.ENOSPC},
		{"write to an image", "vda@s1", NBD_CMD_WRITE, 0, 0, 512, make([]byte, 512), syscall.EPERM},
		{"zeroes over the end", "vda", NBD_CMD_WRITE_ZEROES, 0, size - 512, 1024, nil, syscall.ENOSPC},
		{"zeroes of 4 GiB", "vda", NBD_CMD_WRITE_ZEROES, 0, 0, math.MaxUint32 &^ 511, nil, syscall.ENOSPC},
		{"zeroes to an image", "vda@s1", NBD_CMD_WRITE_ZEROES, 0, 0, 512, nil, syscall.EPERM},
		{"trim over the end", "vda", NBD_CMD_TRIM, 0, size - 512, 1024, nil, syscall.EINVAL},
		{"trim of 4 GiB", "vda", NBD_CMD_TRIM, 0, 0, math.MaxUint32 &^ 511, nil, syscall.EINVAL},
		{"unknown command", "vda", 77, 0, 0, 512, nil, syscall.EINVAL},
		{"unknown flag", "vda", NBD_CMD_READ, 1 << 14, 0, 512, nil, syscall.EINVAL},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := d.open(tc.export)
			err := c.do(tc.command, tc.flags, tc.off, tc.n, tc.payload, nil)
			if !errors.Is(err, tc.want) {
				t.Errorf("reply\n got %v\nwant %v", err, tc.want)
			}
			p := make([]byte, SectorSize)
			if err := c.readAt(p, miB); err != nil {
				t.Errorf("the next request: %v", err)
			}
			if err := Verify(p, "vda", miB, 1, 1); err != nil {
				t.Error(err)
			}
		})
	}
	p := make([]byte, size)
	if err := d.open("vda").readAt(p, 0); err != nil {
		t.Fatal(err)
	}
	if err := Verify(p[:size/2], "vda", 0, 1, 1); err != nil {
		t.Errorf("a bad request changed the device: %v", err)
	}
	if err := Verify(p[size/2:], "vda", size/2, 0, 0); err != nil {
		t.Errorf("a bad request changed the device: %v", err)
	}
}

// What clients do at any byte of handshake and transmission hurts no other.
func TestClientsThatDisconnect(t *testing.T) {
	needRoot(t)
	d, _ := serveOrigin(t, 4*miB)
	mkdir(t, d.snapshot("s1"))
	bystander := d.open("vda")

	// A whole conversation: flags, GO, and a write of 64 KiB in pass 2.
	p := make([]byte, 64*kiB)
	Stamp(p, "vda", 0, 2)
	talk := binary.BigEndian.AppendUint32(nil, NBD_FLAG_C_FIXED_NEWSTYLE|NBD_FLAG_C_NO_ZEROES)
	talk = append(talk, encodeGo("vda")...)
	talk = append(talk, encodeRequest(NBD_CMD_WRITE, 0, 1, 0, uint32(len(p)), nil)...)
	payload := len(talk)
	talk = append(talk, p...)

	cuts := []int{payload + 1, payload + 4096, len(talk) - 1, len(talk)}
	for cut := range payload { // every byte of handshake and request header
		cuts = append(cuts, cut)
	}
	for _, cut := range cuts {
		conn := dial(t, d.socket())
		conn.Write(talk[:cut]) // the server may close first
		conn.Close()
	}
	got := make([]byte, len(p))
	if err := bystander.readAt(got, 0); err != nil {
		t.Fatalf("another client: %v", err)
	}
	if err := Verify(got, "vda", 0, 1, 2); err != nil {
		t.Errorf("after writes that were cut off: %v", err)
	}
}

func TestGarbage(t *testing.T) {
	needRoot(t)
	d, _ := serveOrigin(t, 4*miB)
	bystander := d.open("vda")
	rng := rand.NewChaCha8([32]byte{1})
	t.Run("in the handshake", func(t *testing.T) {
		for range 50 {
			conn := dial(t, d.socket())
			sendGarbage(t, conn, rng)
		}
	})
	t.Run("in the transmission", func(t *testing.T) {
		for range 50 {
			sendGarbage(t, d.open("vda").Conn, rng)
		}
	})
	t.Run("an option of 4 GiB", func(t *testing.T) {
		c := &nbdConn{Conn: dial(t, d.socket())}
		if err := c.greet(); err != nil {
			t.Fatal(err)
		}
		head := binary.BigEndian.AppendUint64(nil, nbdOptionMagic)
		head = binary.BigEndian.AppendUint32(head, NBD_OPT_GO)
		head = binary.BigEndian.AppendUint32(head, math.MaxUint32)
		c.Write(head)
		sendGarbage(t, c.Conn, rng)
	})
	p := make([]byte, SectorSize)
	if err := bystander.readAt(p, 0); err != nil {
		t.Fatalf("another client: %v", err)
	}
	if err := Verify(p, "vda", 0, 1, 1); err != nil {
		t.Error(err)
	}
}

// A snapshot with a client is destroyed only by force; the client is then told,
// and the others do not notice.
func TestDestroyedUnderAClient(t *testing.T) {
	needRoot(t)
	d, _ := serveOrigin(t, 4*miB)
	mkdir(t, d.snapshot("s1"))
	c, bystander := d.open("vda@s1"), d.open("vda")
	p := make([]byte, SectorSize)
	if err := c.readAt(p, 0); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Rmdir(d.snapshot("s1")); err != syscall.EBUSY {
		t.Errorf("rmdir of a snapshot with a client: %v, want EBUSY", err)
	}
	d.blksnap("snapshot", "destroy", "--force", "s1")
	if err := c.readAt(p, 0); !errors.Is(err, syscall.ESHUTDOWN) {
		t.Errorf("read of a destroyed image: %v, want ESHUTDOWN", err)
	}
	if err := c.flush(); !errors.Is(err, syscall.ESHUTDOWN) {
		t.Errorf("flush of a destroyed image: %v, want ESHUTDOWN", err)
	}
	again := &nbdConn{Conn: dial(t, d.socket())}
	if err := again.handshake("vda@s1"); err == nil {
		t.Error("a destroyed image could be opened")
	}
	if err := bystander.readAt(p, 0); err != nil {
		t.Errorf("the live device: %v", err)
	}
}

// sendGarbage sends random bytes, and checks that the server then ends the
// connection, whatever it answers first.
func sendGarbage(t *testing.T, conn net.Conn, rng *rand.ChaCha8) {
	t.Helper()
	p := make([]byte, 64*kiB)
	rng.Read(p)
	conn.Write(p) // fails where the server has closed already
	conn.(*net.UnixConn).CloseWrite()
	if _, err := io.Copy(io.Discard, conn); err != nil && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("after garbage the server did not close: %v", err)
	}
	conn.Close()
}
