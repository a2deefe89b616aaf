// The handshake: fixed newstyle negotiation, section "Handshake".

package intercept

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"
	"time"

	"github.com/pojntfx/go-nbd/pkg/protocol"
)

const (
	// maxOption is how long the data of an option may be, in bytes: enough for
	// a name and some queries of the greatest length.
	maxOption = 64 << 10

	// maxSkip is how much data of a longer option is skipped so that it can be
	// answered; one longer still ends the connection.
	maxSkip = 1 << 20
)

// handshake is a connection in its first phase. It belongs to one goroutine.
type handshake struct {
	server     *Server
	connection *connection
	conn       net.Conn      // a *tls.Conn once TLS has begun
	out        *bufio.Writer // to conn, flushed after each option's replies
	client     string        // for people: who it is

	mustTLS  bool // no option but STARTTLS and ABORT before TLS
	tls      bool // TLS has begun
	fixed    bool // the client knows fixed newstyle
	noZeroes bool

	// What was negotiated; all of it is forgotten when TLS begins.
	style    style
	metaFor  string // the export that contexts are of, its canonical name
	contexts []metaContext

	export *Export // what the session will use, once it is chosen
}

// errAborted ends a connection whose client has had enough.
var errAborted = errors.New("aborted by the client")

// run negotiates until an export is chosen.
func (h *handshake) run(ctx context.Context) error {
	if err := h.greet(); err != nil {
		return err
	}
	for h.export == nil {
		if err := h.option(ctx); err != nil {
			if h.export != nil {
				h.export.Release()
			}
			return err
		}
	}
	return nil
}

// greet exchanges the flags.
func (h *handshake) greet() error {
	const flags = NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES
	h.write(protocol.NegotiationNewstyleHeader{OldstyleMagic: NBDMAGIC, OptionMagic: IHAVEOPT, HandshakeFlags: flags})
	if err := h.out.Flush(); err != nil {
		return fmt.Errorf("send greeting: %w", err)
	}
	var client uint32
	if err := binary.Read(h.conn, binary.BigEndian, &client); err != nil {
		return fmt.Errorf("read client flags: %w", err)
	}
	if client&^(NBD_FLAG_C_FIXED_NEWSTYLE|NBD_FLAG_C_NO_ZEROES) != 0 {
		return fmt.Errorf("unknown client flags %#x", client)
	}
	h.fixed = client&NBD_FLAG_C_FIXED_NEWSTYLE != 0
	h.noZeroes = client&NBD_FLAG_C_NO_ZEROES != 0
	return nil
}

// option serves one option. It returns an error only if the connection cannot
// go on.
func (h *handshake) option(ctx context.Context) error {
	if h.server.stopping.Load() {
		// One more look for what is on its way; Shutdown has set a deadline
		// that ends reads at once.
		h.conn.SetReadDeadline(time.Now().Add(lastLook))
	}
	var o protocol.NegotiationOptionHeader
	if err := binary.Read(h.conn, binary.BigEndian, &o); err != nil {
		return fmt.Errorf("read option: %w", err)
	}
	if o.OptionMagic != IHAVEOPT {
		return fmt.Errorf("bad magic in option %#x", o.OptionMagic)
	}
	data, err := h.data(o)
	if err != nil {
		return err
	}
	if o.ID == NBD_OPT_EXPORT_NAME {
		err = h.exportName(ctx, data)
	} else if !h.fixed {
		return fmt.Errorf("option %d from a client that knows only NBD_OPT_EXPORT_NAME", o.ID)
	} else {
		err = h.serve(ctx, o.ID, data)
	}
	if ferr := h.out.Flush(); err == nil && ferr != nil {
		err = fmt.Errorf("send reply to option %d: %w", o.ID, ferr)
	}
	return err
}

// data reads the data of an option. It is nil if it was too long, and skipped.
func (h *handshake) data(o protocol.NegotiationOptionHeader) ([]byte, error) {
	if o.Length > maxSkip || o.Length > maxOption && o.ID == NBD_OPT_EXPORT_NAME {
		return nil, fmt.Errorf("option %d with %d bytes of data", o.ID, o.Length)
	}
	if o.Length > maxOption {
		if _, err := io.CopyN(io.Discard, h.conn, int64(o.Length)); err != nil {
			return nil, fmt.Errorf("skip data of option %d: %w", o.ID, err)
		}
		return nil, nil
	}
	data := make([]byte, o.Length)
	if _, err := io.ReadFull(h.conn, data); err != nil {
		return nil, fmt.Errorf("read data of option %d: %w", o.ID, err)
	}
	return data, nil
}

// serve replies to every option but EXPORT_NAME. data is nil if it was too
// long.
func (h *handshake) serve(ctx context.Context, id uint32, data []byte) error {
	switch {
	case id == NBD_OPT_ABORT:
		h.ack(id)
		h.out.Flush()
		return errAborted
	case h.server.stopping.Load():
		h.fail(id, NBD_REP_ERR_SHUTDOWN, errStopping.text)
	case id == NBD_OPT_STARTTLS:
		return h.startTLS(ctx, data)
	case h.mustTLS && !h.tls:
		h.fail(id, NBD_REP_ERR_TLS_REQD, "begin with STARTTLS")
	case data == nil:
		h.fail(id, NBD_REP_ERR_TOO_BIG, "option is too long")
	case id == NBD_OPT_LIST:
		h.list(data)
	case id == NBD_OPT_INFO || id == NBD_OPT_GO:
		h.infoOrGo(ctx, id, data)
	case id == NBD_OPT_STRUCTURED_REPLY:
		h.structuredReply(data)
	case id == NBD_OPT_EXTENDED_HEADERS:
		h.extendedHeaders(data)
	case id == NBD_OPT_LIST_META_CONTEXT || id == NBD_OPT_SET_META_CONTEXT:
		h.meta(ctx, id, data)
	default:
		h.fail(id, NBD_REP_ERR_UNSUP, "unknown option")
	}
	return nil
}

// write puts v, of fixed size, into the output.
func (h *handshake) write(v any) {
	// An error of the output comes back from Flush; v is always encodable.
	binary.Write(h.out, binary.BigEndian, v)
}

// reply writes a reply to option id; data follows.
func (h *handshake) reply(id, typ uint32, n int) {
	h.write(protocol.NegotiationReplyHeader{ReplyMagic: NBD_REP_MAGIC, ID: id, Type: typ, Length: uint32(n)})
}

func (h *handshake) ack(id uint32) { h.reply(id, NBD_REP_ACK, 0) }

// fail writes an error reply, with its text.
func (h *handshake) fail(id, typ uint32, text string) {
	text = wireText(text)
	h.reply(id, typ, len(text))
	h.out.WriteString(text)
}

// open opens an export; on failure it has replied to option id and returns
// false.
func (h *handshake) open(ctx context.Context, id uint32, name string) (e Export, ok bool) {
	e, err := h.server.opts.Exports.Open(ctx, name, h.client)
	switch {
	case err == nil:
		return e, true
	case errors.Is(err, syscall.ESHUTDOWN):
		h.fail(id, NBD_REP_ERR_SHUTDOWN, err.Error())
	default:
		h.fail(id, NBD_REP_ERR_UNKNOWN, err.Error())
	}
	return e, false
}

// choose makes e the export of the session, and drops the metadata contexts that
// were selected for another one.
func (h *handshake) choose(e Export) {
	h.export = &e
	if h.metaFor != e.Name {
		h.contexts = nil
	}
}
