// The options that lead to an export.

package intercept

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/pojntfx/go-nbd/pkg/protocol"
)

// What NBD_INFO_BLOCK_SIZE announces, in bytes, section "Size constraints".
const (
	minimumBlock   = 1
	preferredBlock = 4096
)

// exportName serves the option that cannot fail: all that remains is to end the
// connection.
func (h *handshake) exportName(ctx context.Context, data []byte) error {
	name := string(data)
	switch {
	case !validString(name):
		return errors.New("export name is not a string")
	case h.mustTLS && !h.tls:
		return fmt.Errorf("export %q asked for without TLS", name)
	case h.style == extended:
		return errors.New("EXPORT_NAME after EXTENDED_HEADERS")
	case h.server.stopping.Load():
		return errStopped
	}
	h.connection.opening()
	e, err := h.server.opts.Exports.Open(ctx, name, h.client)
	if err != nil {
		return fmt.Errorf("open export %q: %w", name, err)
	}
	h.choose(e)
	h.write(uint64(e.Device.Size()))
	h.write(h.flags(e))
	if !h.noZeroes {
		h.out.Write(make([]byte, 124))
	}
	return nil
}

// list names all exports.
func (h *handshake) list(data []byte) {
	if len(data) > 0 {
		h.fail(NBD_OPT_LIST, NBD_REP_ERR_INVALID, "LIST takes no data")
		return
	}
	for _, e := range h.server.opts.Exports.List() {
		h.reply(NBD_OPT_LIST, NBD_REP_SERVER, 4+len(e.Name)+len(e.Description))
		h.write(uint32(len(e.Name)))
		h.out.WriteString(e.Name)
		h.out.WriteString(e.Description)
	}
	h.ack(NBD_OPT_LIST)
}

// infoOrGo describes an export; GO also chooses it.
func (h *handshake) infoOrGo(ctx context.Context, id uint32, data []byte) {
	name, infos, ok := parseInfo(data)
	if !ok {
		h.fail(id, NBD_REP_ERR_INVALID, "malformed request")
		return
	}
	h.connection.opening()
	e, ok := h.open(ctx, id, name)
	if !ok {
		return
	}
	if id == NBD_OPT_GO {
		h.choose(e)
	} else {
		defer e.Release()
	}
	h.infos(id, e, infos)
	h.ack(id)
}

// infos writes the NBD_REP_INFO replies: always that on the export itself, and
// what was asked for.
func (h *handshake) infos(id uint32, e Export, asked []uint16) {
	h.reply(id, NBD_REP_INFO, 2+8+2)
	h.write(protocol.NegotiationReplyInfo{
		Type: NBD_INFO_EXPORT, Size: uint64(e.Device.Size()), TransmissionFlags: h.flags(e),
	})
	if slices.Contains(asked, NBD_INFO_NAME) {
		h.reply(id, NBD_REP_INFO, 2+len(e.Name))
		h.write(NBD_INFO_NAME)
		h.out.WriteString(e.Name)
	}
	if slices.Contains(asked, NBD_INFO_DESCRIPTION) && e.Description != "" {
		h.reply(id, NBD_REP_INFO, 2+len(e.Description))
		h.write(NBD_INFO_DESCRIPTION)
		h.out.WriteString(e.Description)
	}
	if slices.Contains(asked, NBD_INFO_BLOCK_SIZE) {
		h.reply(id, NBD_REP_INFO, 2+3*4)
		h.write(protocol.NegotiationReplyBlockSize{
			Type: NBD_INFO_BLOCK_SIZE, MinimumBlockSize: minimumBlock,
			PreferredBlockSize: preferredBlock, MaximumBlockSize: maxPayload,
		})
	}
}

// flags are the transmission flags of an export as negotiated. Multi-conn:
// Device.Flush covers the writes of all connections.
func (h *handshake) flags(e Export) uint16 {
	f := NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA | NBD_FLAG_CAN_MULTI_CONN | NBD_FLAG_SEND_CACHE
	if e.Device.ReadOnly() {
		f |= NBD_FLAG_READ_ONLY
	} else {
		f |= NBD_FLAG_SEND_TRIM | NBD_FLAG_SEND_WRITE_ZEROES | NBD_FLAG_SEND_FAST_ZERO
	}
	if h.style != simple {
		f |= NBD_FLAG_SEND_DF
	}
	if h.style == extended && h.metaFor == e.Name && len(h.contexts) > 0 {
		f |= NBD_FLAG_BLOCK_STATUS_PAYLOAD
	}
	return f
}

// commandFlags are the command flags that go with what was negotiated.
func (h *handshake) commandFlags() uint16 {
	f := NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_REQ_ONE | NBD_CMD_FLAG_FAST_ZERO
	if h.style != simple {
		f |= NBD_CMD_FLAG_DF
	}
	if h.style == extended {
		f |= NBD_CMD_FLAG_PAYLOAD_LEN
	}
	return f
}

// structuredReply turns on structured replies.
func (h *handshake) structuredReply(data []byte) {
	const id = NBD_OPT_STRUCTURED_REPLY
	switch {
	case len(data) > 0:
		h.fail(id, NBD_REP_ERR_INVALID, "STRUCTURED_REPLY takes no data")
	case h.style == extended:
		h.fail(id, NBD_REP_ERR_EXT_HEADER_REQD, "extended headers were negotiated")
	default:
		h.style = structured
		h.ack(id)
	}
}

// extendedHeaders turns on extended headers, which include what structured
// replies are.
func (h *handshake) extendedHeaders(data []byte) {
	const id = NBD_OPT_EXTENDED_HEADERS
	if len(data) > 0 {
		h.fail(id, NBD_REP_ERR_INVALID, "EXTENDED_HEADERS takes no data")
		return
	}
	h.style = extended
	h.ack(id)
}

// parseInfo takes the data of INFO or GO apart; what it returns is ok only if
// every byte has its place.
func parseInfo(data []byte) (name string, infos []uint16, ok bool) {
	name, data, ok = cutString(data)
	if !ok || len(data) < 2 {
		return "", nil, false
	}
	n := int(binary.BigEndian.Uint16(data))
	data = data[2:]
	if len(data) != 2*n {
		return "", nil, false
	}
	for ; n > 0; n-- {
		infos = append(infos, binary.BigEndian.Uint16(data))
		data = data[2:]
	}
	return name, infos, true
}

// cutString takes a string with its length, 32 bits, from the front of p.
func cutString(p []byte) (s string, rest []byte, ok bool) {
	if len(p) < 4 {
		return "", nil, false
	}
	n := binary.BigEndian.Uint32(p)
	p = p[4:]
	if uint64(n) > uint64(len(p)) {
		return "", nil, false
	}
	s = string(p[:n])
	return s, p[n:], validString(s)
}

// validString says whether s is a string as section "Conventions" has it.
func validString(s string) bool {
	return len(s) <= maxString && utf8.ValidString(s) && !strings.Contains(s, "\x00")
}

// wireText makes a string of an error's text: UTF-8 without NUL, and short.
func wireText(s string) string {
	s = strings.ReplaceAll(s[:min(len(s), maxMessage)], "\x00", "")
	return strings.ToValidUTF8(s, "")
}
