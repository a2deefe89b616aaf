package intercept

import (
	"bytes"
	"encoding/binary"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestOptions sends one option in a fresh connection and looks at the final
// reply, or at the connection's end.
func TestOptions(t *testing.T) {
	const ended = 0 // instead of a reply
	exports := newShelf(map[string]Device{"disk": newMemory(1 << 20), "other": newMemory(4096)})
	exports.opening = func(name string) error {
		if name == "leaving" {
			return &refusal{"being removed", syscall.ESHUTDOWN}
		}
		return nil
	}
	_, addr := startServer(t, Options{Exports: exports})
	long := strings.Repeat("x", maxString+1)
	tooShort := func(p []byte) []byte { return p[:len(p)-1] }

	for _, tc := range []struct {
		name string
		id   uint32
		data []byte
		want uint32
	}{
		{"unknown option", 77, nil, NBD_REP_ERR_UNSUP},
		{"unknown option with data", 4, []byte("peek"), NBD_REP_ERR_UNSUP},
		{"option too long", NBD_OPT_LIST, make([]byte, maxOption+1), NBD_REP_ERR_TOO_BIG},
		{"option much too long", 77, make([]byte, maxSkip+1), ended},
		{"abort", NBD_OPT_ABORT, nil, NBD_REP_ACK},
		{"abort with data", NBD_OPT_ABORT, []byte("bye"), NBD_REP_ACK},
		{"abort with too much data", NBD_OPT_ABORT, make([]byte, maxOption+1), NBD_REP_ACK},
		{"list", NBD_OPT_LIST, nil, NBD_REP_ACK},
		{"list with data", NBD_OPT_LIST, []byte("x"), NBD_REP_ERR_INVALID},
		{"info", NBD_OPT_INFO, infoData("disk"), NBD_REP_ACK},
		{"info of the default", NBD_OPT_INFO, infoData(""), NBD_REP_ACK},
		{"info of unknown export", NBD_OPT_INFO, infoData("nobody"), NBD_REP_ERR_UNKNOWN},
		{"info of leaving export", NBD_OPT_INFO, infoData("leaving"), NBD_REP_ERR_SHUTDOWN},
		{"info with unknown requests", NBD_OPT_INFO, infoData("disk", 99, 100), NBD_REP_ACK},
		{"info without anything", NBD_OPT_INFO, nil, NBD_REP_ERR_INVALID},
		{"info cut short", NBD_OPT_INFO, tooShort(infoData("disk", 1)), NBD_REP_ERR_INVALID},
		{"info with more than it says", NBD_OPT_INFO, append(infoData("disk"), 0), NBD_REP_ERR_INVALID},
		{"info with a name beyond the option", NBD_OPT_INFO, []byte{0xff, 0xff, 0xff, 0xff, 'd', 0, 0}, NBD_REP_ERR_INVALID},
		{"info with a long name", NBD_OPT_INFO, infoData(long), NBD_REP_ERR_INVALID},
		{"info with NUL", NBD_OPT_INFO, infoData("di\x00sk"), NBD_REP_ERR_INVALID},
		{"info with bad UTF-8", NBD_OPT_INFO, infoData("\xff"), NBD_REP_ERR_INVALID},
		{"go to unknown export", NBD_OPT_GO, infoData("nobody"), NBD_REP_ERR_UNKNOWN},
		{"go cut short", NBD_OPT_GO, []byte{0, 0}, NBD_REP_ERR_INVALID},
		{"structured replies", NBD_OPT_STRUCTURED_REPLY, nil, NBD_REP_ACK},
		{"structured replies with data", NBD_OPT_STRUCTURED_REPLY, []byte("x"), NBD_REP_ERR_INVALID},
		{"extended headers", NBD_OPT_EXTENDED_HEADERS, nil, NBD_REP_ACK},
		{"extended headers with data", NBD_OPT_EXTENDED_HEADERS, []byte("x"), NBD_REP_ERR_INVALID},
		{"TLS without certificate", NBD_OPT_STARTTLS, nil, NBD_REP_ERR_POLICY},
		{"TLS with data", NBD_OPT_STARTTLS, []byte("x"), NBD_REP_ERR_INVALID},
		{"list contexts", NBD_OPT_LIST_META_CONTEXT, metaData("disk"), NBD_REP_ACK},
		{"list contexts of unknown export", NBD_OPT_LIST_META_CONTEXT, metaData("nobody"), NBD_REP_ERR_UNKNOWN},
		{"list contexts cut short", NBD_OPT_LIST_META_CONTEXT, tooShort(metaData("disk", "base:")), NBD_REP_ERR_INVALID},
		{"list contexts with too many queries", NBD_OPT_LIST_META_CONTEXT,
			append(appendString(nil, "disk"), 0xff, 0xff, 0xff, 0xff), NBD_REP_ERR_INVALID},
		{"list contexts without namespace", NBD_OPT_LIST_META_CONTEXT, metaData("disk", "base"), NBD_REP_ERR_INVALID},
		{"set contexts before structured replies", NBD_OPT_SET_META_CONTEXT, metaData("disk", "base:allocation"), NBD_REP_ERR_INVALID},
		{"export name unknown", NBD_OPT_EXPORT_NAME, []byte("nobody"), ended},
		{"export name leaving", NBD_OPT_EXPORT_NAME, []byte("leaving"), ended},
		{"export name too long", NBD_OPT_EXPORT_NAME, []byte(long), ended},
		{"export name with NUL", NBD_OPT_EXPORT_NAME, []byte("a\x00"), ended},
		{"export name much too long", NBD_OPT_EXPORT_NAME, make([]byte, maxOption+1), ended},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := dial(t, addr)
			c.sendOption(tc.id, len(tc.data), tc.data)
			if tc.want != ended {
				replies := c.optionReplies(tc.id)
				if got := replies[len(replies)-1].typ; got != tc.want {
					t.Fatalf("final reply\n got %#x\nwant %#x", got, tc.want)
				}
			}
			if tc.want == ended || tc.id == NBD_OPT_ABORT {
				c.wantEnd()
				return
			}
			// Whatever was wrong, the connection is in step and goes on.
			if got := c.final(NBD_OPT_INFO, infoData("disk")); got != NBD_REP_ACK {
				t.Errorf("INFO afterwards\n got %#x\nwant %#x", got, NBD_REP_ACK)
			}
		})
	}
}

func TestClientFlags(t *testing.T) {
	addr := serveDevice(t, newMemory(1<<20))
	for _, tc := range []struct {
		name  string
		flags uint32
		works bool
	}{
		{"none", 0, true},
		{"fixed newstyle", NBD_FLAG_C_FIXED_NEWSTYLE, true},
		{"unknown flag", NBD_FLAG_C_FIXED_NEWSTYLE | 1<<2, false},
		{"high flag", NBD_FLAG_C_FIXED_NEWSTYLE | 1<<31, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := dialRaw(t, addr)
			c.greet(tc.flags)
			if !tc.works {
				c.wantEnd()
				return
			}
			// Without NBD_FLAG_C_NO_ZEROES 124 zeroes follow.
			c.sendOption(NBD_OPT_EXPORT_NAME, 4, []byte("disk"))
			got := make([]byte, 8+2+124)
			c.read(got)
			want := binary.BigEndian.AppendUint64(nil, 1<<20)
			want = binary.BigEndian.AppendUint16(want, simpleFlags)
			want = append(want, make([]byte, 124)...)
			if !bytes.Equal(got, want) {
				t.Errorf("reply to EXPORT_NAME\n got % x\nwant % x", got, want)
			}
		})
	}
}

// simpleFlags are the transmission flags of a writable export with simple
// replies.
const simpleFlags = NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA | NBD_FLAG_SEND_TRIM |
	NBD_FLAG_SEND_WRITE_ZEROES | NBD_FLAG_CAN_MULTI_CONN | NBD_FLAG_SEND_CACHE | NBD_FLAG_SEND_FAST_ZERO

func TestOnlyExportNameWithoutFixedNewstyle(t *testing.T) {
	c := dialRaw(t, serveDevice(t, newMemory(1<<20)))
	c.greet(0)
	c.sendOption(NBD_OPT_LIST, 0, nil)
	c.wantEnd()
}

func TestBadOptionMagic(t *testing.T) {
	c := dial(t, serveDevice(t, newMemory(1<<20)))
	c.write(make([]byte, 16))
	c.wantEnd()
}

func TestList(t *testing.T) {
	exports := newShelf(map[string]Device{"disk": newMemory(1), "disk@monday": newMemory(1)})
	_, addr := startServer(t, Options{Exports: exports})
	got := dial(t, addr).option(NBD_OPT_LIST, nil)
	want := []optionReply{
		{NBD_REP_SERVER, append(appendString(nil, "disk"), "about disk"...)},
		{NBD_REP_SERVER, append(appendString(nil, "disk@monday"), "about disk@monday"...)},
		{NBD_REP_ACK, []byte{}},
	}
	if d := cmp.Diff(want, got, cmp.AllowUnexported(optionReply{})); d != "" {
		t.Errorf("replies to LIST (-want +got)\n%s", d)
	}
}

// TestInfo checks every information type, and that GO repeats what INFO said.
func TestInfo(t *testing.T) {
	image := newMemory(5000)
	image.readOnly = true
	exports := newShelf(map[string]Device{"disk": newMemory(1 << 20), "image": image})
	_, addr := startServer(t, Options{Exports: exports})
	const ro = NBD_FLAG_HAS_FLAGS | NBD_FLAG_READ_ONLY | NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA | NBD_FLAG_CAN_MULTI_CONN | NBD_FLAG_SEND_CACHE
	export := func(size uint64, flags uint16) optionReply {
		p := binary.BigEndian.AppendUint64([]byte{0, 0}, size)
		return optionReply{NBD_REP_INFO, binary.BigEndian.AppendUint16(p, flags)}
	}
	ack := optionReply{NBD_REP_ACK, []byte{}}
	blockSize := optionReply{NBD_REP_INFO, []byte{0, 3, 0, 0, 0, 1, 0, 0, 0x10, 0, 2, 0, 0, 0}}

	for _, tc := range []struct {
		name, export string
		style        style
		asked        []uint16
		want         []optionReply
	}{
		{"simple", "disk", simple, nil, []optionReply{export(1<<20, simpleFlags), ack}},
		{"structured", "disk", structured, nil, []optionReply{export(1<<20, simpleFlags|NBD_FLAG_SEND_DF), ack}},
		{"extended", "disk", extended, nil, []optionReply{export(1<<20, simpleFlags|NBD_FLAG_SEND_DF), ack}},
		{"read-only", "image", simple, nil, []optionReply{export(5000, ro), ack}},
		{"everything", "", simple, []uint16{NBD_INFO_BLOCK_SIZE, NBD_INFO_DESCRIPTION, 17, NBD_INFO_NAME}, []optionReply{
			export(1<<20, simpleFlags),
			{NBD_REP_INFO, append([]byte{0, 1}, "disk"...)},
			{NBD_REP_INFO, append([]byte{0, 2}, "about disk"...)},
			blockSize, ack,
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := dial(t, addr)
			switch tc.style {
			case structured:
				c.wantFinal(NBD_OPT_STRUCTURED_REPLY, nil, NBD_REP_ACK)
			case extended:
				c.wantFinal(NBD_OPT_EXTENDED_HEADERS, nil, NBD_REP_ACK)
			}
			for _, id := range []uint32{NBD_OPT_INFO, NBD_OPT_GO} {
				got := c.option(id, infoData(tc.export, tc.asked...))
				if d := cmp.Diff(tc.want, got, cmp.AllowUnexported(optionReply{})); d != "" {
					t.Errorf("replies to option %d (-want +got)\n%s", id, d)
				}
			}
		})
	}
}

func TestExtendedHeadersExclude(t *testing.T) {
	addr := serveDevice(t, newMemory(1<<20))
	c := dial(t, addr)
	c.wantFinal(NBD_OPT_STRUCTURED_REPLY, nil, NBD_REP_ACK)
	c.wantFinal(NBD_OPT_EXTENDED_HEADERS, nil, NBD_REP_ACK)
	c.wantFinal(NBD_OPT_STRUCTURED_REPLY, nil, NBD_REP_ERR_EXT_HEADER_REQD)
	c.sendOption(NBD_OPT_EXPORT_NAME, 4, []byte("disk"))
	c.wantEnd()
}

// TestReleaseAfterFailedGo cuts the connection while GO is being answered: the
// export must be released all the same, which startServer's cleanup checks.
func TestReleaseAfterFailedGo(t *testing.T) {
	exports := newShelf(map[string]Device{"disk": newMemory(1 << 20)})
	opening := make(chan struct{})
	exports.opening = func(string) error { <-opening; return nil }
	_, addr := startServer(t, Options{Exports: exports})
	for _, id := range []uint32{NBD_OPT_GO, NBD_OPT_INFO} {
		c := dial(t, addr)
		data := infoData("disk")
		c.sendOption(id, len(data), data)
		c.conn.Close()
	}
	close(opening)
}
